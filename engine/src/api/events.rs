//! `/events`: past events, then each as it happens.

use std::sync::Arc;

use tokio::{sync::broadcast::error::RecvError, time::Instant};

use crate::{
    error::{Error, Result},
    events::Event,
    http::{Request, Response, body, filters::Filters},
    time::UnixNanos,
};

const FILTERS: &[&str] = &[
    "config",
    "container",
    "daemon",
    "event",
    "image",
    "label",
    "network",
    "node",
    "plugin",
    "scope",
    "secret",
    "service",
    "type",
    "volume",
];

pub(crate) fn events(request: &Request) -> Result<Response> {
    let filters = Filters::of(&request.query, FILTERS)?;
    let time = |name: &str| -> Result<Option<UnixNanos>> {
        let parsed = request.query.get(name).map(UnixNanos::parse_query).transpose();
        parsed.map_err(|error| Error::invalid(format!("invalid value for \"{name}\": {error}")))
    };
    let (since, until) = (time("since")?, time("until")?);
    if let (Some(since), Some(until)) = (since, until)
        && until < since
    {
        return Err(Error::invalid("`since` time cannot be after `until` time"));
    }
    let (past, mut coming) = request.core.events.subscribe();
    let past: Vec<Arc<Event>> = match since {
        Some(since) => past
            .into_iter()
            .filter(|event| event.at() >= since && until.is_none_or(|until| event.at() <= until))
            .collect(),
        None => Vec::new(),
    };
    // A time further away than a century is no end.
    let deadline = until.and_then(|until| {
        let nanos = u64::try_from(until.0.saturating_sub(UnixNanos::now().0)).unwrap_or(0);
        Instant::now().checked_add(std::time::Duration::from_nanos(nanos))
    });
    let (feed, response) = body::stream("application/json");
    request.core.tasks.spawn(request.core.closing.clone().run_until_cancelled_owned(async move {
        for event in past {
            if event.matches(&filters) && feed.send(body::json_line(&*event)).await.is_err() {
                return;
            }
        }
        loop {
            let event = tokio::select! {
                () = feed.closed() => return,
                () = sleep_until(deadline) => return,
                event = coming.recv() => event,
            };
            let event = match event {
                Ok(event) => event,
                Err(RecvError::Lagged(missed)) => {
                    tracing::warn!(missed, "a client of the events is too slow");
                    continue;
                }
                Err(RecvError::Closed) => return,
            };
            if event.matches(&filters) && feed.send(body::json_line(&*event)).await.is_err() {
                return;
            }
        }
    }));
    Ok(response)
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
