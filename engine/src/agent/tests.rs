//! A guest that lies.

use std::{path::Path, sync::Arc};

use async_trait::async_trait;
use coracle_agent_api::{
    DiffId, LayerSource,
    frame::{Header, Kind},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::watch,
};

use super::{Agent, AgentError, Frame};
use crate::sandbox::{
    Running, Sandbox, SandboxError, SandboxId, SandboxState, TreeGrant, TreeName, TreeSource,
};

/// A sandbox whose agent answers every connection with the same bytes and hangs up.
struct Liar {
    id: SandboxId,
    answer: Vec<u8>,
}

#[async_trait]
impl Sandbox for Liar {
    fn id(&self) -> &SandboxId {
        &self.id
    }

    fn state(&self) -> watch::Receiver<SandboxState> {
        watch::channel(SandboxState::Stopped).1
    }

    async fn start(&self) -> Result<Arc<Running>, SandboxError> {
        Err(SandboxError::NotRunning { id: self.id.clone() })
    }

    async fn adopt(&self) -> Result<Option<Arc<Running>>, SandboxError> {
        Ok(None)
    }

    async fn connect(&self) -> Result<UnixStream, SandboxError> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let answer = self.answer.clone();
        tokio::spawn(async move {
            // The request's head comes in one piece.
            let mut request = [0; 4096];
            let _ = theirs.read(&mut request).await;
            let _ = theirs.write_all(&answer).await;
        });
        Ok(ours)
    }

    async fn pass_stream(&self, _: u32, _: u32, _: std::os::fd::OwnedFd) -> Result<(), SandboxError> {
        unreachable!("no call in these tests has a stream")
    }

    async fn attach_layer(&self, _: &DiffId, _: &Path, _: u64) -> Result<LayerSource, SandboxError> {
        Err(SandboxError::NotRunning { id: self.id.clone() })
    }

    async fn detach_layer(&self, _: &DiffId) -> Result<(), SandboxError> {
        Ok(())
    }

    async fn grant(&self, _: &TreeGrant, _: std::os::fd::OwnedFd) -> Result<TreeSource, SandboxError> {
        Err(SandboxError::NotRunning { id: self.id.clone() })
    }

    async fn revoke(&self, _: &TreeName) -> Result<(), SandboxError> {
        Ok(())
    }

    async fn grants(&self) -> Result<Vec<TreeName>, SandboxError> {
        Ok(Vec::new())
    }

    async fn stop(&self) -> Result<(), SandboxError> {
        Ok(())
    }
}

fn agent(answer: impl Into<Vec<u8>>) -> Agent {
    Agent::new(Arc::new(Liar { id: SandboxId::shared(), answer: answer.into() }))
}

fn with_body(status: &str, body: &[u8]) -> Vec<u8> {
    let mut answer = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n", body.len()).into_bytes();
    answer.extend_from_slice(body);
    answer
}

#[tokio::test]
async fn nonsense_is_an_error_of_that_one_call() {
    for (what, answer) in [
        ("nothing", Vec::new()),
        ("no HTTP", b"hello\r\n\r\n".to_vec()),
        ("no JSON", with_body("200 OK", b"hello")),
        ("other JSON", with_body("200 OK", br#"{"processes":3}"#)),
        ("unknown members", with_body("200 OK", br#"{"processes":[],"layers":[],"more":1}"#)),
        ("an illegal id", with_body("200 OK", br#"{"processes":[{"id":"../../x"}],"layers":[]}"#)),
        ("too much", with_body("200 OK", &vec![b' '; 17 * 1024 * 1024])),
        ("an error that is none", with_body("500 Oh", b"{}")),
        ("a switch of protocols", b"HTTP/1.1 101 Switching Protocols\r\n\r\n".to_vec()),
    ] {
        assert!(agent(answer).state().await.is_err(), "{what}");
    }
    let refused =
        agent(with_body("409 Conflict", br#"{"kind":"conflict","message":"it runs"}"#)).state().await;
    assert!(matches!(refused, Err(AgentError::Refused(error)) if error.message == "it runs"));
}

fn frame(kind: Kind, sequence: u64, unix_nanos: u64, payload: &[u8]) -> Vec<u8> {
    let header = Header { kind, len: u32::try_from(payload.len()).unwrap(), sequence, unix_nanos };
    [&header.encode()[..], payload].concat()
}

async fn frames(frames: &[Vec<u8>]) -> Result<Vec<Frame>, AgentError> {
    let head = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: coracle-output\r\n\r\n";
    let agent = agent([&head[..], &frames.concat()].concat());
    let mut stream = agent.output(&"a".repeat(64).parse().unwrap(), 0).await?;
    let mut got = Vec::new();
    loop {
        let frame = stream.next().await?;
        let is_end = matches!(frame, Frame::End);
        got.push(frame);
        if is_end {
            return Ok(got);
        }
    }
}

#[tokio::test]
async fn frames_must_be_whole_and_in_order() {
    let exit = br#"{"code":3,"oom_killed":false,"finished_unix_nanos":9}"#;
    let good = [
        frame(Kind::Stdout, 1, 10, b"hello"),
        frame(Kind::Stderr, 2, 11, b""),
        frame(Kind::Exit, 3, 12, exit),
        frame(Kind::End, 4, 13, b""),
    ];
    let got = frames(&good).await.unwrap();
    assert!(matches!(&got[0], Frame::Output { bytes, .. } if &bytes[..] == b"hello"));
    assert!(matches!(&got[2], Frame::Exit(status) if status.code == 3));
    let mut unknown_kind = frame(Kind::Stdout, 1, 10, b"");
    unknown_kind[0] = 9;
    let mut too_long = frame(Kind::Stdout, 1, 10, b"");
    too_long[4] = 0xff;
    for (what, bad) in [
        ("a gap", vec![good[0].clone(), good[2].clone()]),
        ("a repetition", vec![good[0].clone(), good[0].clone()]),
        ("time that stands still", vec![good[0].clone(), frame(Kind::Stdout, 2, 10, b"x")]),
        ("half a frame", vec![good[0][..20].to_vec()]),
        ("half a payload", vec![good[0][..26].to_vec()]),
        ("an unknown kind", vec![unknown_kind]),
        ("a length beyond the limit", vec![too_long]),
        ("an exit that is none", vec![frame(Kind::Exit, 1, 1, b"{}")]),
        ("an end without an end", vec![good[0].clone()]),
    ] {
        assert!(matches!(frames(&bad).await, Err(AgentError::Stream(_))), "{what}");
    }
}
