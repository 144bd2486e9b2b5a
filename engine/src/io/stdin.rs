//! The way from attached clients to a process's standard input.
//!
//! The way exists before the process does, so that a client can attach first and start then. The connection to the agent is
//! made with the first bytes. The input is ended by a call of its own, after everything was taken: so the end of a
//! connection, which a killed daemon causes too, is not the end of the input.

use std::sync::Mutex;

use bytes::Bytes;
use coracle_agent_api::ProcessId;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
};

use crate::agent::{Agent, AgentError};

/// How many pieces of input wait for the process before the client has to.
const QUEUE: usize = 4;

/// What a client sends.
#[derive(Debug)]
pub(crate) enum Input {
    Bytes(Bytes),
    /// The process is to see the end of its input.
    Close,
}

struct Slot {
    sender: mpsc::Sender<Input>,
    receiver: Option<mpsc::Receiver<Input>>,
}

/// The client's end for the present or next run of a container.
pub(crate) struct StdinPort {
    slot: Mutex<Slot>,
}

impl Slot {
    fn new() -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        Self { sender, receiver: Some(receiver) }
    }
}

impl StdinPort {
    pub(crate) fn new() -> Self {
        Self { slot: Mutex::new(Slot::new()) }
    }

    /// Where a client's input goes.
    pub(crate) fn sender(&self) -> mpsc::Sender<Input> {
        self.slot.lock().expect("no holder panics").sender.clone()
    }

    /// Takes the input for a run that begins.
    pub(crate) fn begin(&self) -> mpsc::Receiver<Input> {
        let mut slot = self.slot.lock().expect("no holder panics");
        if slot.receiver.is_none() {
            *slot = Slot::new();
        }
        slot.receiver.take().expect("made above if it was taken")
    }

    /// The run has ended: input that is sent from now on is for the next.
    pub(crate) fn end(&self) {
        *self.slot.lock().expect("no holder panics") = Slot::new();
    }
}

/// Forwards input to a process until it is closed or the process takes no more.
pub(crate) async fn forward(
    agent: Agent,
    id: ProcessId,
    mut input: mpsc::Receiver<Input>,
) -> Result<(), AgentError> {
    let Some(mut next) = input.recv().await else { return Ok(()) };
    let mut stream = agent.stdin(&id).await?;
    loop {
        match next {
            Input::Bytes(bytes) => stream.write_all(&bytes).await.map_err(AgentError::Stream)?,
            Input::Close => break,
        }
        if input.is_empty() {
            stream.flush().await.map_err(AgentError::Stream)?;
        }
        let Some(another) = input.recv().await else { break };
        next = another;
    }
    stream.shutdown().await.map_err(AgentError::Stream)?;
    // No one's bytes are taken any more; wait until the agent has taken those that are on the way.
    drop(input);
    let mut nothing = [0; 64];
    while stream.read(&mut nothing).await.map_err(AgentError::Stream)? > 0 {}
    agent.close_stdin(&id).await
}
