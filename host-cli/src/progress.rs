//! Progress on a terminal for whatever takes over half a second; silence in a pipe.

use std::{future::Future, time::Duration};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::terminal;

/// What takes less than this is not announced.
const PATIENCE: Duration = Duration::from_millis(500);

/// Waits for something; if it takes over half a second, says what is being waited for.
pub(crate) async fn while_waiting<F: Future>(what: &'static str, future: F) -> F::Output {
    if !terminal::shows_progress() {
        return future.await;
    }
    tokio::pin!(future);
    tokio::select! {
        output = &mut future => return output,
        () = tokio::time::sleep(PATIENCE) => {}
    }
    let spinner = ProgressBar::new_spinner().with_message(what);
    spinner.enable_steady_tick(Duration::from_millis(100));
    let output = future.await;
    spinner.finish_and_clear();
    output
}

/// A bar for a known number of bytes; hidden in a pipe.
pub(crate) fn bytes_bar(total: Option<u64>, what: &str) -> ProgressBar {
    let target =
        if terminal::shows_progress() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let template = match total {
        Some(_) => "{msg} {wide_bar} {bytes}/{total_bytes}",
        None => "{msg} {spinner} {bytes}",
    };
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::with_draw_target(total, target).with_style(style).with_message(what.to_owned())
}
