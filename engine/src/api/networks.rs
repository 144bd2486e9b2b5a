//! `/networks/*`.

use std::{collections::BTreeMap, sync::Arc};

use http::StatusCode;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{prune::until, to_its_end};
use crate::{
    container::{options, record::Record},
    core::Core,
    error::{Error, Result},
    http::{Request, Response, body, filters::Filters},
    networks::{
        Driver, Network,
        create::CreateRequest,
        endpoint::{Lease, Wanted},
    },
};

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct ConnectRequest {
    container: String,
    endpoint_config: Option<Wanted>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct DisconnectRequest {
    container: String,
    force: bool,
}

pub(crate) async fn create(mut request: Request) -> Result<Response> {
    let wanted: CreateRequest = options::typed(options::object(&request.read_body().await?)?)?;
    let core = Arc::clone(&request.core);
    let network = to_its_end(&request.core, async move { core.create_network(wanted).await }).await?;
    Ok(body::json(StatusCode::CREATED, &json!({ "Id": network.id.as_str(), "Warning": "" })))
}

pub(crate) fn list(request: &Request) -> Result<Response> {
    let filters =
        Filters::of(&request.query, &["dangling", "driver", "id", "label", "name", "scope", "type"])?;
    if let Some(bad) =
        filters.values("type").iter().find(|kind| !matches!(kind.as_str(), "custom" | "builtin"))
    {
        let shown: String = bad.chars().take(40).collect();
        return Err(Error::invalid(format!("invalid filter: 'type'='{shown}'")));
    }
    let core = &request.core;
    let fits = |network: &Arc<Network>| {
        let kind = if network.is_predefined() { "builtin" } else { "custom" };
        let dangling = !network.is_predefined() && core.networks.members(&network.id).is_empty();
        filters.any("driver", |wanted| wanted == network.driver.name())
            && filters.any("id", |wanted| network.id.as_str().contains(wanted))
            && filters.any("name", |wanted| network.name.contains(wanted))
            && filters.any("scope", |wanted| wanted == "local")
            && filters.any("type", |wanted| wanted == kind)
            && filters.any("dangling", |wanted| {
                matches!(wanted, "1" | "true" | "t" | "T" | "TRUE" | "True") == dangling
            })
            && filters.labels("label", |name| network.labels.get(name).map(String::as_str))
    };
    let networks: Vec<_> =
        core.networks.all().iter().filter(|network| fits(network)).map(|network| describe(network)).collect();
    Ok(body::ok(&networks))
}

pub(crate) fn inspect(request: &Request, name: &str) -> Result<Response> {
    if request.query.get("scope").is_some_and(|scope| !matches!(scope, "" | "local")) {
        return Err(crate::networks::no_such_network(name));
    }
    let network = request.core.networks.find(name)?;
    let mut described = describe(&network);
    described["Containers"] = members(&request.core, &network);
    Ok(body::ok(&described))
}

pub(crate) async fn remove(request: &Request, name: &str) -> Result<Response> {
    let (core, name) = (Arc::clone(&request.core), name.to_owned());
    to_its_end(&request.core, async move { core.remove_network(&name).await.map(drop) }).await?;
    Ok(body::empty(StatusCode::NO_CONTENT))
}

pub(crate) async fn connect(mut request: Request, name: &str) -> Result<Response> {
    let mut members = options::object(&request.read_body().await?)?;
    let wanted: ConnectRequest = options::typed(std::mem::take(&mut members))?;
    let network = request.core.networks.find(name)?;
    let container = request.core.containers.find(&wanted.container)?;
    let settings = wanted.endpoint_config.unwrap_or_default();
    to_its_end(&request.core, async move { container.connect(network.id.to_string(), settings).await })
        .await?;
    Ok(body::empty(StatusCode::OK))
}

pub(crate) async fn disconnect(mut request: Request, name: &str) -> Result<Response> {
    let wanted: DisconnectRequest = options::typed(options::object(&request.read_body().await?)?)?;
    let network = match request.core.networks.find(name) {
        Ok(network) => network.name.clone(),
        // A container can be rid of a network that is gone.
        Err(_) if wanted.force => name.to_owned(),
        Err(error) => return Err(error),
    };
    let container = request.core.containers.find(&wanted.container)?;
    to_its_end(&request.core, async move { container.disconnect(network).await }).await?;
    Ok(body::empty(StatusCode::OK))
}

pub(crate) async fn prune(request: &Request) -> Result<Response> {
    let filters = Filters::of(&request.query, &["until", "label", "label!"])?;
    let before = match filters.values("until") {
        [] => None,
        [one] => Some(until(one)?),
        _ => return Err(Error::invalid("more than one until filter specified")),
    };
    let core = Arc::clone(&request.core);
    let deleted = to_its_end(&request.core, async move {
        let mut deleted = Vec::new();
        for network in core.networks.all() {
            let label = |name: &str| network.labels.get(name).map(String::as_str);
            let unwanted = !filters.values("label!").is_empty() && filters.labels("label!", label);
            let old = before.is_none_or(|before| network.created < before);
            if network.is_predefined() || unwanted || !old || !filters.labels("label", label) {
                continue;
            }
            match core.remove_network(network.id.as_str()).await {
                Ok(network) => deleted.push(network.name.clone()),
                // It is in use, or someone else has removed it.
                Err(error) if matches!(error.status(), StatusCode::FORBIDDEN | StatusCode::NOT_FOUND) => {}
                Err(error) => tracing::warn!(%error, network = network.name, "cannot prune a network"),
            }
        }
        Ok(deleted)
    })
    .await?;
    Ok(body::ok(&json!({ "NetworksDeleted": deleted })))
}

fn describe(network: &Network) -> Value {
    let config: Vec<Value> = network
        .pools
        .iter()
        .map(|pool| {
            let mut config =
                json!({ "Subnet": pool.subnet.to_string(), "Gateway": pool.gateway.to_string() });
            if let Some(range) = pool.range {
                config["IPRange"] = json!(range.to_string());
            }
            if !pool.auxiliary.is_empty() {
                config["AuxiliaryAddresses"] = json!(pool.auxiliary);
            }
            config
        })
        .collect();
    json!({
        "Name": network.name,
        "Id": network.id.as_str(),
        "Created": network.created.rfc3339(),
        "Scope": "local",
        "Driver": network.driver.name(),
        "EnableIPv4": network.has_ipv4(),
        "EnableIPv6": network.has_ipv6(),
        "IPAM": {
            "Driver": "default",
            "Options": if network.ipam_options.is_empty() { Value::Null } else { json!(network.ipam_options) },
            "Config": if network.driver == Driver::Bridge { json!(config) } else { Value::Null },
        },
        "Internal": network.internal,
        "Attachable": network.attachable,
        "Ingress": false,
        "ConfigFrom": { "Network": "" },
        "ConfigOnly": false,
        "Containers": {},
        "Options": network.options,
        "Labels": network.labels,
    })
}

fn members(core: &Core, network: &Network) -> Value {
    let describe = |(id, lease): (coracle_agent_api::ProcessId, Lease)| {
        let name = core.containers.find(id.as_str()).map(|container| container.record().name.clone());
        let address = |ipv4| {
            let found = lease.addresses.iter().find(|net| net.addr().is_ipv4() == ipv4);
            found.map(ToString::to_string).unwrap_or_default()
        };
        let described = json!({
            "Name": name.unwrap_or_default(),
            "EndpointID": lease.endpoint,
            "MacAddress": lease.mac.map(|mac| mac.to_string()).unwrap_or_default(),
            "IPv4Address": address(true),
            "IPv6Address": address(false),
        });
        (id.to_string(), described)
    };
    Value::Object(core.networks.members(&network.id).into_iter().map(describe).collect())
}

/// The `Networks` of a container's `NetworkSettings`.
pub(super) fn of_container(core: &Core, record: &Record) -> Value {
    let running = record.state.status.is_running();
    let describe = |(name, attached): (&String, &crate::networks::endpoint::Attached)| {
        let network = core.networks.find(&attached.network).or_else(|_| core.networks.find(name)).ok();
        let lease = attached.lease.as_ref().filter(|_| running);
        let net = |ipv4: bool| {
            lease.and_then(|lease| lease.addresses.iter().find(|net| net.addr().is_ipv4() == ipv4))
        };
        let address = |ipv4| net(ipv4).map(|net| net.addr().to_string()).unwrap_or_default();
        let prefix = |ipv4| net(ipv4).map_or(0, |net| net.prefix_len());
        let gateway = |ipv4: bool| {
            let pool = network.as_ref().filter(|network| lease.is_some() && !network.internal);
            let pool = pool
                .and_then(|network| network.pools.iter().find(|pool| pool.subnet.addr().is_ipv4() == ipv4));
            pool.map(|pool| pool.gateway.to_string()).unwrap_or_default()
        };
        let mac = lease.and_then(|lease| lease.mac).map(|mac| mac.to_string());
        let wanted = &attached.wanted;
        let user_defined = network.as_ref().is_some_and(|network| network.is_user_defined());
        let names = user_defined.then(|| crate::networks::names_of(record, wanted));
        let list = |items: &Vec<String>| if items.is_empty() { Value::Null } else { json!(items) };
        let described = json!({
            "IPAMConfig": wanted.ipam.as_ref().map_or(Value::Null, |ipam| json!(ipam)),
            "Links": list(&wanted.links),
            "Aliases": list(&wanted.aliases),
            "MacAddress": mac.unwrap_or_else(|| wanted.mac_address.clone()),
            "DriverOpts": if wanted.driver_opts.is_empty() { Value::Null } else { json!(wanted.driver_opts) },
            "GwPriority": wanted.gw_priority,
            "NetworkID": network.as_ref().map(|network| network.id.to_string()).unwrap_or_else(|| attached.network.clone()),
            "EndpointID": lease.map(|lease| lease.endpoint.clone()).unwrap_or_default(),
            "Gateway": gateway(true),
            "IPAddress": address(true),
            "IPPrefixLen": prefix(true),
            "IPv6Gateway": gateway(false),
            "GlobalIPv6Address": address(false),
            "GlobalIPv6PrefixLen": prefix(false),
            "DNSNames": names.map_or(Value::Null, |names| json!(names)),
        });
        (name.clone(), described)
    };
    Value::Object(record.networks.iter().map(describe).collect::<Map<_, _>>())
}

/// Docker's map of ports: those that are published, and those that could be.
fn ports(record: &Record) -> Value {
    let mut ports: Map<String, Value> = Map::new();
    if !record.state.status.is_running() {
        return Value::Object(ports);
    }
    for port in record.config.exposed_ports.keys() {
        ports.insert(port.clone(), Value::Null);
    }
    for published in &record.ports {
        let host = published.host;
        let binding = json!({ "HostIp": host.ip().to_string(), "HostPort": host.port().to_string() });
        match ports.entry(format!("{}/{}", published.port, published.protocol.name())).or_insert(Value::Null)
        {
            Value::Array(bindings) => bindings.push(binding),
            none => *none = json!([binding]),
        }
    }
    Value::Object(ports)
}

/// The same for lists of containers.
pub(super) fn port_list(record: &Record) -> Value {
    if !record.state.status.is_running() {
        return json!([]);
    }
    let published = record.ports.iter().map(|published| {
        let host = published.host;
        json!({
            "IP": host.ip().to_string(),
            "PrivatePort": published.port,
            "PublicPort": host.port(),
            "Type": published.protocol.name(),
        })
    });
    let exposed = record.config.exposed_ports.keys().filter_map(|text| {
        let (port, protocol) = crate::ports::wanted::split(text).ok()?;
        let is_it = |published: &crate::ports::Published| {
            published.port == port && published.protocol.name() == protocol
        };
        let is_published = record.ports.iter().any(is_it);
        (!is_published).then(|| json!({ "PrivatePort": port, "Type": protocol }))
    });
    Value::Array(published.chain(exposed).collect())
}

/// A container's `NetworkSettings`. What older clients read at the top is that of the default bridge.
pub(super) fn settings(core: &Core, record: &Record) -> Value {
    let networks = of_container(core, record);
    let running = record.state.status.is_running();
    let mut value = json!({
        "Bridge": "",
        "SandboxID": if running { record.id.as_str() } else { "" },
        "SandboxKey": "",
        "Ports": ports(record),
        "HairpinMode": false,
        "LinkLocalIPv6Address": "",
        "LinkLocalIPv6PrefixLen": 0,
        "SecondaryIPAddresses": null,
        "SecondaryIPv6Addresses": null,
    });
    let nothing: BTreeMap<&str, Value> = [
        ("EndpointID", json!("")),
        ("Gateway", json!("")),
        ("GlobalIPv6Address", json!("")),
        ("GlobalIPv6PrefixLen", json!(0)),
        ("IPAddress", json!("")),
        ("IPPrefixLen", json!(0)),
        ("IPv6Gateway", json!("")),
        ("MacAddress", json!("")),
    ]
    .into();
    for (name, nothing) in nothing {
        value[name] = networks.get("bridge").map_or(nothing, |bridge| bridge[name].clone());
    }
    value["Networks"] = networks;
    value
}
