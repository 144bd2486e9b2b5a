//! `/containers/{id}/update`: what of a container can be changed after it was made.

use serde_json::json;

use super::to_its_end;
use crate::{
    container::{
        config::HostConfig,
        options::{object, typed},
        refused, resources,
        restart::Policy,
    },
    error::Result,
    http::{Request, Response, body},
};

pub(crate) async fn update(mut request: Request, id: &str) -> Result<Response> {
    let container = request.core.containers.find(id)?;
    let mut members = object(&request.read_body().await?)?;
    let policy = members.remove("RestartPolicy");
    refused::check_update(&members)?;
    members.extend(policy.map(|policy| ("RestartPolicy".to_owned(), policy)));
    let mut update: HostConfig = typed(members)?;
    Policy::parse(&update.restart_policy)?;
    let warnings = resources::check(&mut update, true)?;
    to_its_end(&request.core, async move { container.update(update).await }).await?;
    Ok(body::ok(&json!({ "Warnings": warnings })))
}
