//! Conversations with an agent that go on for as long as the daemon runs: begun anew in each life of its sandbox, and, since an
//! agent may end one for no reason, after a while in the same life too.

use std::time::Duration;

use tokio::{sync::watch, time::Instant};

use super::SandboxState;

/// A conversation that broke is begun again after this long, and longer each time that it breaks soon.
const FIRST_WAIT: Duration = Duration::from_millis(250);
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// When to begin a conversation, and when it is over.
#[derive(Debug)]
pub(crate) struct Lives {
    state: watch::Receiver<SandboxState>,
    /// The life that a conversation was begun in, and when.
    begun: Option<(u64, Instant)>,
    wait: Duration,
}

fn life(state: &SandboxState) -> Option<u64> {
    state.running().map(|running| running.instance)
}

impl Lives {
    pub(crate) fn new(state: watch::Receiver<SandboxState>) -> Self {
        Self { state, begun: None, wait: FIRST_WAIT }
    }

    /// Returns when it is time for the first or the next conversation; `false` when the sandbox's object is gone.
    pub(crate) async fn begin(&mut self) -> bool {
        if let Some((before, at)) = self.begun.take() {
            if at.elapsed() > LONGEST_WAIT {
                self.wait = FIRST_WAIT;
            }
            let over = self.state.wait_for(|state| life(state) != Some(before));
            match tokio::time::timeout(self.wait, over).await {
                Ok(Ok(_)) => self.wait = FIRST_WAIT,
                Ok(Err(_)) => return false,
                Err(_) => self.wait = (self.wait * 2).min(LONGEST_WAIT),
            }
        }
        let now =
            self.state.wait_for(|state| life(state).is_some()).await.ok().and_then(|state| life(&state));
        self.begun = now.map(|life| (life, Instant::now()));
        self.begun.is_some()
    }

    /// Returns when the life is over that the conversation was begun in.
    pub(crate) async fn over(&mut self) {
        let Some((this, _)) = self.begun else { return };
        let _ = self.state.wait_for(|state| life(state) != Some(this)).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::sandbox::Running;

    fn running(instance: u64) -> SandboxState {
        SandboxState::Running(Arc::new(Running {
            instance,
            hello: None,
            boot: Vec::new(),
            adopted: false,
            lost: None,
        }))
    }

    #[tokio::test(start_paused = true)]
    async fn each_life_has_a_conversation_at_once_and_a_broken_one_waits() {
        let (state, seen) = watch::channel(SandboxState::Stopped);
        let mut lives = Lives::new(seen);
        let begun = Instant::now();
        state.send_replace(running(1));
        for after in [Duration::ZERO, FIRST_WAIT, FIRST_WAIT * 3] {
            assert!(lives.begin().await);
            assert_eq!(begun.elapsed(), after);
        }
        let again = Instant::now();
        state.send_replace(running(2));
        lives.over().await;
        for after in [Duration::ZERO, FIRST_WAIT] {
            assert!(lives.begin().await);
            assert_eq!(again.elapsed(), after);
        }
        drop(state);
        assert!(!lives.begin().await);
    }
}
