//! `coracle network`.

use anyhow::Context;
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
                .post_json("/networks/create", &request(command))
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

/// Docker's `NetworkCreateRequest`. A gateway or a range goes with the subnet of its family.
fn request(command: &NetworkCommand) -> Value {
    let NetworkCommand::Create { subnet, gateway, ip_range, ipv6, internal, label, opt, name } = command
    else {
        return Value::Null;
    };
    let of = |all: &[String], is_v6: bool| {
        all.iter().find(|text| text.contains(':') == is_v6).cloned().unwrap_or_default()
    };
    let config: Vec<Value> = match subnet.is_empty() {
        true => gateway.iter().chain(ip_range).map(|text| json!({ "Gateway": text })).collect(),
        false => subnet
            .iter()
            .map(|subnet| {
                let is_v6 = subnet.contains(':');
                json!({ "Subnet": subnet, "Gateway": of(gateway, is_v6), "IPRange": of(ip_range, is_v6) })
            })
            .collect(),
    };
    let pairs = |all: &[String]| -> Map<String, Value> {
        let pair = |text: &String| {
            let (name, value) = text.split_once('=').unwrap_or((text, ""));
            (name.to_owned(), Value::from(value))
        };
        all.iter().map(pair).collect()
    };
    json!({
        "Name": name,
        "Internal": internal,
        "EnableIPv6": ipv6 | subnet.iter().any(|subnet| subnet.contains(':')),
        "IPAM": { "Config": config },
        "Labels": pairs(label),
        "Options": pairs(opt),
    })
}
