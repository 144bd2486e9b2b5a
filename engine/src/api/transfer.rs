//! What pull and push have in common: work that tells its progress line by line. What fails before the first line is an
//! HTTP error, afterwards a line that says so; a client that goes away ends the work.

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use crate::{
    core::Core,
    error::{Error, Kind, Result},
    http::{Response, body},
};

/// How many lines wait for the client.
const QUEUE: usize = 32;

/// What the work tells.
pub(super) enum Report {
    Line(Value),
    Done(Result<()>),
}

/// Where the work tells its lines.
#[derive(Clone)]
pub(super) struct Lines(mpsc::Sender<Report>);

impl Lines {
    /// Tells one; a client that is gone has this work ended by other means.
    pub(super) async fn say(&self, line: Value) {
        let _ = self.0.send(Report::Line(line)).await;
    }
}

/// Does the work and streams its lines.
pub(super) async fn stream<F: Future<Output = Result<()>> + Send + 'static>(
    core: &Core,
    work: impl FnOnce(Lines) -> F,
) -> Result<Response> {
    let (sender, mut inbox) = mpsc::channel(QUEUE);
    let work = work(Lines(sender.clone()));
    let closing = core.closing.clone();
    let working = AbortOnDropHandle::new(core.tasks.spawn(async move {
        let ending = || Error::new(Kind::Unavailable, "the daemon is ending");
        let done = closing.run_until_cancelled_owned(work).await.unwrap_or_else(|| Err(ending()));
        let _ = sender.send(Report::Done(done)).await;
    }));
    let first = inbox.recv().await.ok_or_else(|| Error::internal("the work ended without a word"))?;
    let first = match first {
        Report::Done(Err(error)) => return Err(error),
        other => other,
    };
    let (feed, response) = body::stream("application/json");
    core.tasks.spawn(async move {
        let _working = working;
        let mut next = Some(first);
        while let Some(report) = next {
            if let Some(line) = line(report)
                && feed.send(line).await.is_err()
            {
                return;
            }
            next = tokio::select! {
                () = feed.closed() => return,
                next = inbox.recv() => next,
            };
        }
    });
    Ok(response)
}

fn line(report: Report) -> Option<Bytes> {
    match report {
        Report::Line(line) => Some(body::json_line(&line)),
        Report::Done(Ok(())) => None,
        Report::Done(Err(error)) => {
            let message = error.to_string();
            Some(body::json_line(&json!({ "errorDetail": { "message": message }, "error": message })))
        }
    }
}

/// `{"status":"Pull complete","progressDetail":{},"id":"abc"}`.
pub(super) fn step(status: &str, id: &str) -> Value {
    json!({ "status": status, "progressDetail": {}, "id": id })
}

/// A line with a bar, in figures and as text for old clients.
pub(super) fn progress(status: &str, id: &str, current: u64, total: u64) -> Value {
    json!({
        "status": status,
        "progressDetail": { "current": current, "total": total },
        "progress": bar(current, total),
        "id": id,
    })
}

/// Docker's bar: `[=====>     ]  1.2MB/3MB`.
fn bar(current: u64, total: u64) -> String {
    let numbers = format!("{:>8}", human(current));
    if total == 0 || current > total {
        return numbers;
    }
    let filled = usize::try_from(u128::from(current) * 50 / u128::from(total)).unwrap_or(50);
    let arrow = if filled < 50 { ">" } else { "" };
    let rest = 50 - filled - arrow.len();
    format!("[{}{arrow}{}] {numbers}/{}", "=".repeat(filled), " ".repeat(rest), human(total))
}

/// Four digits with a decimal unit.
fn human(bytes: u64) -> String {
    let (mut value, mut unit) = (bytes as f64, "B");
    for next in ["kB", "MB", "GB", "TB", "PB", "EB"] {
        if value < 1000.0 {
            break;
        }
        (value, unit) = (value / 1000.0, next);
    }
    let decimals = match value {
        v if v >= 1000.0 => 0,
        v if v >= 100.0 => 1,
        v if v >= 10.0 => 2,
        _ => 3,
    };
    let text = format!("{value:.decimals$}");
    let trimmed = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{trimmed}{unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_look_like_dockers() {
        assert_eq!(bar(0, 100), format!("[>{}]       0B/100B", " ".repeat(49)));
        assert_eq!(bar(50, 100), format!("[{}>{}]      50B/100B", "=".repeat(25), " ".repeat(24)));
        assert_eq!(bar(2_207_025, 2_207_025), format!("[{}]  2.207MB/2.207MB", "=".repeat(50)));
        assert_eq!(bar(7, 0), "      7B");
        assert_eq!(human(123_456), "123.5kB");
        assert_eq!(human(u64::MAX), "18.45EB");
    }
}
