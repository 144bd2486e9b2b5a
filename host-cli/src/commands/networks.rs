//! `coracle network`.

use std::net::IpAddr;

use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::each;
use crate::{
    args::{NetworkCommand, endpoint},
    client::{self, Docker, escape},
    failure::Outcome,
    paths::Home,
    table::Table,
    terminal,
};

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Network {
    id: String,
    name: String,
    driver: String,
    scope: String,
}

/// Carries a command out.
pub(super) async fn run(home: &Home, command: &NetworkCommand) -> Outcome {
    let docker = client::connect(home).await?;
    match command {
        NetworkCommand::Create { name, .. } => {
            let made: Value = docker
                .post_json("/networks/create", &request(command)?)
                .await
                .with_context(|| format!("cannot make the network {name}"))?;
            terminal::print(&format!("{}\n", made["Id"].as_str().unwrap_or_default()))?;
            Ok(0)
        }
        NetworkCommand::Ls { quiet } => {
            let networks: Vec<Network> = docker.get("/networks").await.context("cannot list networks")?;
            let mut table = Table::new(&["NETWORK ID", "NAME", "DRIVER", "SCOPE"]);
            let mut ids = String::new();
            for network in networks {
                let short: String = network.id.chars().take(12).collect();
                ids += &format!("{short}\n");
                table.row([short, network.name, network.driver, network.scope]);
            }
            terminal::print(&if *quiet { ids } else { table.render() })?;
            Ok(0)
        }
        NetworkCommand::Inspect { names } => each::inspect(&docker, "/networks", names).await,
        NetworkCommand::Rm { names } => {
            let remove = async |docker: &Docker, name: &str| {
                docker.delete(&format!("/networks/{}", escape(name))).await?;
                Ok(name.to_owned())
            };
            each::each(&docker, names, "remove", remove).await
        }
        NetworkCommand::Connect { ip, ip6, alias, network, container } => {
            let endpoint = endpoint(ip.as_deref(), ip6.as_deref(), alias, None);
            let body = json!({ "Container": container, "EndpointConfig": endpoint });
            change(&docker, network, "connect", &body).await
        }
        NetworkCommand::Disconnect { force, network, container } => {
            let body = json!({ "Container": container, "Force": force });
            change(&docker, network, "disconnect", &body).await
        }
        NetworkCommand::Prune => {
            let pruned: Value = docker
                .post_json("/networks/prune", &json!({}))
                .await
                .context("cannot remove unused networks")?;
            let names = pruned["NetworksDeleted"].as_array().into_iter().flatten().filter_map(Value::as_str);
            terminal::print(&names.map(|name| format!("{name}\n")).collect::<String>())?;
            Ok(0)
        }
    }
}

async fn change(docker: &client::Docker, network: &str, what: &str, body: &Value) -> Outcome {
    let path = format!("/networks/{}/{what}", escape(network));
    docker
        .call(http::Method::POST, &path, client::json_body(body)?)
        .await
        .with_context(|| format!("cannot {what} the container"))?;
    Ok(0)
}

/// Docker's `NetworkCreateRequest`.
fn request(command: &NetworkCommand) -> Result<Value> {
    let NetworkCommand::Create { subnet, gateway, ip_range, ipv6, internal, label, opt, name } = command
    else {
        return Ok(Value::Null);
    };
    let pairs = |all: &[String]| -> Map<String, Value> {
        let pair = |text: &String| {
            let (name, value) = text.split_once('=').unwrap_or((text, ""));
            (name.to_owned(), Value::from(value))
        };
        all.iter().map(pair).collect()
    };
    Ok(json!({
        "Name": name,
        "Internal": internal,
        "EnableIPv6": ipv6 | subnet.iter().any(|subnet| subnet.contains(':')),
        "IPAM": { "Config": pools(subnet, gateway, ip_range)? },
        "Labels": pairs(label),
        "Options": pairs(opt),
    }))
}

/// Docker's `IPAMConfig`s: each subnet with the gateway and the range that are in it. None of them goes without one.
fn pools(subnets: &[String], gateways: &[String], ranges: &[String]) -> Result<Vec<Value>> {
    let net = |text: &String| text.parse::<IpNet>().with_context(|| format!("invalid subnet {text}"));
    let nets = subnets.iter().map(net).collect::<Result<Vec<_>>>()?;
    let mut pools: Vec<Value> = subnets.iter().map(|subnet| json!({ "Subnet": subnet })).collect();
    let mut put = |what: &str, member: &str, text: &String, within: &dyn Fn(&IpNet) -> bool| {
        let Some(at) = nets.iter().position(within) else { bail!("no matching subnet for {what} {text}") };
        if let Some(other) = pools[at][member].as_str() {
            bail!("cannot configure multiple {what}s ({text}, {other}) on the same subnet ({})", nets[at]);
        }
        pools[at][member] = json!(text);
        Ok(())
    };
    for text in ranges {
        let range: IpNet = text.parse().with_context(|| format!("invalid range {text}"))?;
        put("range", "IPRange", text, &|net| net.contains(&range))?;
    }
    for text in gateways {
        let gateway: IpAddr = text.parse().with_context(|| format!("invalid gateway {text}"))?;
        put("gateway", "Gateway", text, &|net| net.contains(&gateway))?;
    }
    Ok(pools)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(subnets: &[&str], gateways: &[&str], ranges: &[&str]) -> Result<Value> {
        let owned = |all: &[&str]| all.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        pools(&owned(subnets), &owned(gateways), &owned(ranges)).map(Value::from)
    }

    #[test]
    fn gateways_and_ranges_go_with_the_subnet_that_they_are_in() {
        let both = made(&["10.1.0.0/16", "fd00::/64"], &["fd00::9", "10.1.0.9"], &["10.1.2.0/24"]).unwrap();
        assert_eq!(
            both,
            json!([
                { "Subnet": "10.1.0.0/16", "Gateway": "10.1.0.9", "IPRange": "10.1.2.0/24" },
                { "Subnet": "fd00::/64", "Gateway": "fd00::9" },
            ])
        );
        assert_eq!(made(&[], &[], &[]).unwrap(), json!([]));
        for (subnets, gateways, ranges, words) in [
            (&["10.1.0.0/16"][..], &["10.2.0.1"][..], &[][..], "no matching subnet for gateway 10.2.0.1"),
            (&["10.1.0.0/16"], &["fd00::1"], &[], "no matching subnet for gateway fd00::1"),
            (&[], &["10.2.0.1"], &[], "no matching subnet for gateway 10.2.0.1"),
            (&["10.1.0.0/16"], &[], &["10.0.0.0/8"], "no matching subnet for range 10.0.0.0/8"),
            (&["10.1.0.0/16"], &["10.1.0.1", "10.1.0.2"], &[], "cannot configure multiple gateways"),
            (&["10.1.0.0"], &[], &[], "invalid subnet 10.1.0.0"),
        ] {
            let error = made(subnets, gateways, ranges).unwrap_err();
            assert!(error.to_string().starts_with(words), "{error}");
        }
    }
}
