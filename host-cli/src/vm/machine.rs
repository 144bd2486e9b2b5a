//! One running machine: the connection to its VMM, the agent's ready connection, and its end, which is noticed by events
//! only. What the guest says is bounded; connections that it makes without being asked are closed.

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream as StdUnixStream,
    },
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use coracle_agent_api::{AGENT_PORT, API_VERSION, Hello, READY_PORT};
use coracle_vmm::control::{Client, Notice};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    net::UnixStream,
    sync::{mpsc, oneshot, watch},
};

/// The longest first line of an agent.
const MAX_HELLO: u64 = 64 * 1024;
/// How long the VMM may take to say why, after the agent's connection has ended.
const REASON_GRACE: Duration = Duration::from_millis(500);

/// A machine that this daemon has a connection to.
#[derive(Debug)]
pub(crate) struct Machine {
    client: Client,
    /// `Some(reason)` once it has ended.
    ended: watch::Receiver<Option<String>>,
    /// The VMM itself has said that it ends, or is gone.
    exited: watch::Receiver<bool>,
}

/// The agent's ready connection as it comes in.
pub(crate) type Ready = oneshot::Receiver<BufReader<UnixStream>>;

impl Machine {
    /// Takes a connected control socket into use. The agent's connection arrives through the returned receiver.
    pub(crate) fn new(control: OwnedFd) -> Result<(Arc<Self>, Ready)> {
        let (notices, inbox) = mpsc::channel(16);
        let (announce, ready) = oneshot::channel();
        let (report, ended) = watch::channel(None);
        let (report_exit, exited) = watch::channel(false);
        // The client's own thread waits here while the inbox is full; it ends with the connection.
        let client = Client::new(control, move |notice| {
            let _ = notices.blocking_send(notice);
        })
        .context("cannot use the control socket")?;
        tokio::spawn(supervise(inbox, announce, report, report_exit));
        Ok((Arc::new(Self { client, ended, exited }), ready))
    }

    /// Makes a call to the VMM on a thread that may wait.
    pub(crate) async fn call<T: Send + 'static>(
        self: &Arc<Self>,
        call: impl FnOnce(&Client) -> Result<T, coracle_vmm::control::ClientError> + Send + 'static,
    ) -> Result<T> {
        let machine = Arc::clone(self);
        Ok(tokio::task::spawn_blocking(move || call(&machine.client)).await??)
    }

    /// A new connection to the agent's API.
    pub(crate) async fn connect(self: &Arc<Self>) -> io::Result<UnixStream> {
        let (ours, theirs) = StdUnixStream::pair()?;
        self.call(move |client| client.vsock_connect(AGENT_PORT, theirs.as_fd())).await.map_err(|error| {
            io::Error::new(io::ErrorKind::ConnectionAborted, crate::failure::describe(&error))
        })?;
        ours.set_nonblocking(true)?;
        UnixStream::from_std(ours)
    }

    /// Has the guest's ready connection sent to us, also the one that an earlier daemon had.
    pub(crate) async fn listen_for_agent(self: &Arc<Self>) -> Result<()> {
        self.call(|client| client.vsock_listen(READY_PORT, true)).await.context("cannot wait for the agent")
    }

    /// Waits until the VMM has nothing more to do for the machine: its disk is written.
    pub(crate) async fn exit(&self) {
        // An error means that nobody watches it any more, because it is gone.
        let _ = self.exited.clone().wait_for(|exited| *exited).await;
    }

    /// Waits for the machine's end, which may be seen a moment before the VMM's; the reason.
    pub(crate) async fn end(&self) -> String {
        match self.ended.clone().wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            Err(_) => "nobody watches it any more".to_owned(),
        }
    }
}

/// Follows a machine to its end, then says why it ended.
async fn supervise(
    mut inbox: mpsc::Receiver<Notice>,
    announce: oneshot::Sender<BufReader<UnixStream>>,
    report: watch::Sender<Option<String>>,
    report_exit: watch::Sender<bool>,
) {
    let mut announce = Some(announce);
    let mut agent_gone: Option<oneshot::Receiver<()>> = None;
    let reason = loop {
        let notice = tokio::select! {
            notice = inbox.recv() => notice,
            _ = async { agent_gone.as_mut().expect("checked").await }, if agent_gone.is_some() => {
                break reason_after_agent(&mut inbox, &report_exit).await;
            }
        };
        match notice {
            Some(Notice::VsockAccepted { port: READY_PORT, stream, .. }) => {
                let Some(announce) = announce.take() else { continue };
                match agent_stream(stream) {
                    Ok((reader, gone)) => {
                        agent_gone = Some(gone);
                        let _ = announce.send(reader);
                    }
                    Err(error) => break format!("the agent's connection cannot be used: {error}"),
                }
            }
            Some(Notice::VsockAccepted { port, .. }) => {
                tracing::warn!(port, "the guest connected to a port that was not offered");
            }
            Some(notice) => {
                report_exit.send_replace(true);
                break exit_reason(Some(notice));
            }
            None => break exit_reason(None),
        }
    };
    tracing::info!(%reason, "the machine has ended");
    report.send_replace(Some(reason));
    // The client's thread must never find the inbox closed with notices left: drain it to the end.
    while let Some(notice) = inbox.recv().await {
        if !matches!(notice, Notice::VsockAccepted { .. }) {
            report_exit.send_replace(true);
        }
    }
}

fn exit_reason(notice: Option<Notice>) -> String {
    match notice {
        Some(Notice::Exited(reason)) => reason.to_string(),
        _ => "its virtual machine monitor is gone".to_owned(),
    }
}

async fn reason_after_agent(inbox: &mut mpsc::Receiver<Notice>, report_exit: &watch::Sender<bool>) -> String {
    let exit = async {
        loop {
            match inbox.recv().await {
                Some(Notice::VsockAccepted { .. }) => {}
                notice => {
                    report_exit.send_replace(true);
                    return exit_reason(notice);
                }
            }
        }
    };
    tokio::time::timeout(REASON_GRACE, exit)
        .await
        .unwrap_or_else(|_| "the agent closed its connection".to_owned())
}

/// Splits the agent's connection into what is read first and the news of its end: a second descriptor of the same stream is
/// watched for the hang-up alone, so that it does not take bytes from the first.
fn agent_stream(stream: OwnedFd) -> io::Result<(BufReader<UnixStream>, oneshot::Receiver<()>)> {
    let stream = StdUnixStream::from(stream);
    stream.set_nonblocking(true)?;
    let watched = UnixStream::from_std(stream.try_clone()?)?;
    let reader = BufReader::new(UnixStream::from_std(stream)?);
    let (gone, heard) = oneshot::channel();
    tokio::spawn(async move {
        loop {
            match watched.ready(tokio::io::Interest::READABLE).await {
                Ok(ready) if !ready.is_read_closed() => {
                    // Bytes that nobody wants yet: wait for the next edge.
                    let _ = watched.try_io(tokio::io::Interest::READABLE, || {
                        Err::<(), _>(io::ErrorKind::WouldBlock.into())
                    });
                }
                _ => break,
            }
        }
        let _ = gone.send(());
    });
    Ok((reader, heard))
}

/// Reads the agent's first line and checks it.
pub(crate) async fn read_hello(stream: &mut BufReader<UnixStream>) -> Result<Hello> {
    let mut line = Vec::new();
    stream
        .take(MAX_HELLO)
        .read_until(b'\n', &mut line)
        .await
        .context("cannot read the agent's first words")?;
    if line.last() != Some(&b'\n') {
        return Err(anyhow!("the agent ended before it had said that it is ready"));
    }
    let hello: Hello = serde_json::from_slice(&line).context("cannot understand the agent's first words")?;
    if hello.api_version != API_VERSION {
        bail!(
            "the guest speaks version {} of the agent's API and this coracle version {API_VERSION}: their builds differ",
            hello.api_version
        );
    }
    Ok(hello)
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::fd::OwnedFd};

    use coracle_vmm::control::{self, Event, ExitReason, FromVmm};
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    /// The VMM's end of a control connection.
    struct FakeVmm(OwnedFd);

    impl FakeVmm {
        fn new() -> (Self, Arc<Machine>, Ready) {
            let (ours, theirs) =
                socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
            let (machine, ready) = Machine::new(ours).unwrap();
            (Self(theirs), machine, ready)
        }

        fn send(&self, event: Event, fds: &[&StdUnixStream]) {
            let bytes = serde_json::to_vec(&FromVmm::Event(event)).unwrap();
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            control::send(&self.0, &bytes, &fds).unwrap();
        }

        /// A guest that connects to the host's `port`; the guest's end.
        fn connect(&self, port: u32) -> StdUnixStream {
            let (host, guest) = StdUnixStream::pair().unwrap();
            self.send(Event::VsockAccepted { port, guest_port: 99 }, &[&host]);
            guest
        }
    }

    fn hello(api_version: u32) -> String {
        format!(
            "{{\"api_version\":{api_version},\"agent_version\":\"1\",\"kernel_release\":\"6\",\"phases\":[]}}\n"
        )
    }

    #[tokio::test]
    async fn a_machine_whose_agent_is_gone_has_ended() {
        let (vmm, machine, ready) = FakeVmm::new();
        let mut guest = vmm.connect(READY_PORT);
        guest.write_all(hello(API_VERSION).as_bytes()).unwrap();
        let said = read_hello(&mut ready.await.unwrap()).await.unwrap();
        assert_eq!(said.kernel_release, "6");
        drop(guest);
        assert_eq!(machine.end().await, "the agent closed its connection");
    }

    #[tokio::test]
    async fn the_vmms_own_reason_is_preferred() {
        let (vmm, machine, ready) = FakeVmm::new();
        let guest = vmm.connect(READY_PORT);
        let _stream = ready.await.unwrap();
        drop(guest);
        vmm.send(Event::Exited { reason: ExitReason::TripleFault }, &[]);
        assert_eq!(machine.end().await, ExitReason::TripleFault.to_string());
        machine.exit().await;
    }

    #[tokio::test]
    async fn a_vmm_that_is_killed_is_noticed() {
        let (vmm, machine, _ready) = FakeVmm::new();
        drop(vmm);
        assert_eq!(machine.end().await, "its virtual machine monitor is gone");
        machine.exit().await;
        assert!(machine.call(|client| client.status()).await.is_err());
    }

    #[tokio::test]
    async fn connections_that_nobody_asked_for_are_closed() {
        use std::io::Read;
        let (vmm, _machine, ready) = FakeVmm::new();
        let mut strange = vmm.connect(7);
        let first = vmm.connect(READY_PORT);
        let mut second = vmm.connect(READY_PORT);
        let _stream = ready.await.unwrap();
        let closed = tokio::task::spawn_blocking(move || (strange.read(&mut [0]), second.read(&mut [0])));
        assert!(matches!(closed.await.unwrap(), (Ok(0), Ok(0))));
        drop(first);
    }

    #[tokio::test]
    async fn first_words_that_are_none_are_refused() {
        let too_long = "x".repeat(MAX_HELLO as usize + 1);
        for words in [hello(API_VERSION + 1), "{}\n".to_owned(), "no line".to_owned(), too_long] {
            let (host, mut guest) = StdUnixStream::pair().unwrap();
            let writer = std::thread::spawn(move || {
                // It fails once the other end has had enough.
                let _ = guest.write_all(words.as_bytes());
            });
            let (mut reader, _gone) = agent_stream(host.into()).unwrap();
            assert!(read_hello(&mut reader).await.is_err());
            drop((reader, _gone));
            writer.join().unwrap();
        }
    }
}
