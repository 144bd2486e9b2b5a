//! `/containers/{id}/wait`: the head of the answer goes out at once, the exit code when there is one.

use serde_json::json;
use tokio::sync::watch;

use crate::{
    container::Lifecycle,
    error::{Error, Result},
    http::{Request, Response, body},
};

pub(crate) fn wait(request: &Request, id: &str) -> Result<Response> {
    let container = request.core.containers.find(id)?;
    let lifecycle = container.lifecycle();
    // What has happened by now is decided now, not when the task below gets its turn.
    let exits = lifecycle.borrow().exits;
    let condition: fn(&Lifecycle, u64) -> bool = match request.query.get("condition") {
        // Whoever waits hears of every end, also of one that a restart follows.
        None | Some("not-running") => {
            |now, exits| !now.status.is_active() || now.exits > exits || now.removed
        }
        Some("next-exit") => |now, exits| now.exits > exits || now.removed,
        Some("removed") => |now, _| now.removed,
        Some(other) => {
            let shown: String = other.chars().take(40).collect();
            return Err(Error::invalid(format!("invalid condition: \"{shown}\"")));
        }
    };
    let (feed, response) = body::stream("application/json");
    request.core.tasks.spawn(request.core.closing.clone().run_until_cancelled_owned(async move {
        tokio::select! {
            () = feed.closed() => {}
            answer = answer(lifecycle, exits, condition) => drop(feed.send(answer).await),
        }
    }));
    Ok(response)
}

async fn answer(
    mut lifecycle: watch::Receiver<Lifecycle>,
    exits: u64,
    condition: fn(&Lifecycle, u64) -> bool,
) -> bytes::Bytes {
    let value = match lifecycle.wait_for(|now| condition(now, exits)).await {
        Ok(now) => {
            // Whoever waits for the removal is told of nothing but a failure to remove.
            let error = (!now.removed && !now.error.is_empty()).then(|| json!({ "Message": now.error }));
            match error {
                Some(error) => json!({ "StatusCode": now.exit_code, "Error": error }),
                None => json!({ "StatusCode": now.exit_code }),
            }
        }
        Err(_) => json!({ "StatusCode": -1, "Error": { "Message": "the daemon is ending" } }),
    };
    body::json_line(&value)
}
