//! `/containers/{id}/update`: what of a container can be changed after it was made.

use serde_json::{Map, Value, json};

use crate::{
    container::{
        config::RestartPolicy,
        options::{object, typed},
        refused,
        restart::Policy,
    },
    error::Result,
    http::{Request, Response, body},
};

pub(crate) async fn update(mut request: Request, id: &str) -> Result<Response> {
    let container = request.core.containers.find(id)?;
    let mut members = object(&request.read_body().await?)?;
    let policy = take_policy(&mut members)?;
    refused::check_update(&members)?;
    if let Some(policy) = policy {
        container.set_restart_policy(policy).await?;
    }
    Ok(body::ok(&json!({ "Warnings": [] })))
}

/// A policy without a name says that there is nothing to change.
fn take_policy(members: &mut Map<String, Value>) -> Result<Option<RestartPolicy>> {
    let Some(policy) = members.remove("RestartPolicy").filter(|policy| !policy.is_null()) else {
        return Ok(None);
    };
    let mut wrapped = Map::new();
    wrapped.insert("RestartPolicy".to_owned(), policy);
    let policy = typed::<crate::container::config::HostConfig>(wrapped)?.restart_policy;
    Policy::parse(&policy)?;
    Ok(Some(policy).filter(|policy| !policy.name.is_empty()))
}
