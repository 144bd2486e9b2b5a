//! Starts the agent as a process of this machine, with images made by mkfs.erofs, and speaks the API with it.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part")]

pub mod image;

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use coracle_agent_api::frame::{Ack, HEADER_LEN, Header, Kind, decode_exit};
use coracle_agent_api::*;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

pub use image::Image;

/// A connection that was upgraded.
pub type Upgraded = TokioIo<hyper::upgrade::Upgraded>;

/// Docker's default capabilities.
pub const CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// A running agent; it is killed when this is dropped.
pub struct TestAgent {
    child: Child,
    dir: tempfile::TempDir,
    ready: BufReader<UnixStream>,
    pub hello: Hello,
}

/// What a process wrote until its end, and how it ended.
#[derive(Debug, Default)]
pub struct Output {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit: Option<ExitStatus>,
    pub frames: Vec<Header>,
}

impl Output {
    pub fn code(&self) -> u8 {
        self.exit.as_ref().expect("the process has ended").code
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// A fresh id.
pub fn new_id() -> ProcessId {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    format!("{:064x}", NEXT.fetch_add(1, Ordering::Relaxed)).parse().unwrap()
}

/// A process with Docker's defaults.
pub fn process(args: &[&str]) -> ProcessSpec {
    ProcessSpec {
        args: args.iter().map(|arg| arg.to_string()).collect(),
        env: vec!["PATH=/usr/bin:/bin".to_owned()],
        cwd: "/".to_owned(),
        capabilities: CAPABILITIES.map(str::to_owned).to_vec(),
        ..ProcessSpec::default()
    }
}

/// A shell that runs a script.
pub fn shell(script: &str) -> ProcessSpec {
    process(&["sh", "-c", script])
}

/// A container over some images, lowest first.
pub fn container(images: &[&Image], process: ProcessSpec) -> ContainerSpec {
    ContainerSpec {
        layers: images.iter().map(|image| image.layer()).collect(),
        hostname: "box".to_owned(),
        process,
        shm_size: 64 << 20,
        ..ContainerSpec::default()
    }
}

impl TestAgent {
    /// Starts an agent and waits until it is ready.
    pub async fn start() -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests need root");
        let base = if Path::new("/dev/shm").is_dir() { "/dev/shm" } else { "/tmp" };
        let dir = tempfile::Builder::new().prefix("coracle-agent-").tempdir_in(base).unwrap();
        let listener = UnixListener::bind(dir.path().join("ready")).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_coracle-guest-agent"))
            .arg("--listen-unix")
            .arg(dir.path().join("api"))
            .arg("--ready-unix")
            .arg(dir.path().join("ready"))
            .arg("--data-dir")
            .arg(dir.path().join("data"))
            .env("CORACLE_LOG", "warn")
            .spawn()
            .unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let mut ready = BufReader::new(stream);
        let mut line = String::new();
        ready.read_line(&mut line).await.unwrap();
        let hello = serde_json::from_str(&line).unwrap();
        Self { child, dir, ready, hello }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// The group of all containers, as the agent sees it.
    pub fn cgroup(&self) -> PathBuf {
        let data = self.data().canonicalize().unwrap();
        let below_root = data.strip_prefix("/").unwrap();
        let seen = PathBuf::from(format!("/proc/{}/root", self.pid())).join(below_root);
        seen.join("run/cgroup").join(format!("coracle-{}", self.pid()))
    }

    async fn connect(&self) -> hyper::client::conn::http1::SendRequest<Full<Bytes>> {
        let stream = UnixStream::connect(self.dir.path().join("api")).await.unwrap();
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection.with_upgrades());
        sender
    }

    /// Sends bytes, gets the status and bytes.
    pub async fn raw(&self, method: Method, path: &str, body: Vec<u8>) -> (StatusCode, Bytes) {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "agent")
            .body(Full::new(Bytes::from(body)))
            .unwrap();
        let response = self.connect().await.send_request(request).await.unwrap();
        let status = response.status();
        (status, response.into_body().collect().await.unwrap().to_bytes())
    }

    async fn call(&self, method: Method, path: &str, body: Vec<u8>) -> Result<Bytes, ApiError> {
        let (status, bytes) = self.raw(method, path, body).await;
        if status.is_success() {
            return Ok(bytes);
        }
        let error: ApiError = serde_json::from_slice(&bytes).expect("a failure answers an ApiError");
        assert_eq!(status.as_u16(), error.kind.http_status());
        Err(error)
    }

    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ApiError> {
        let bytes = self.call(Method::GET, path, Vec::new()).await?;
        Ok(serde_json::from_slice(&bytes).unwrap())
    }

    pub async fn post(&self, path: &str, body: &impl Serialize) -> Result<Bytes, ApiError> {
        self.call(Method::POST, path, serde_json::to_vec(body).unwrap()).await
    }

    pub async fn delete(&self, path: &str) -> Result<(), ApiError> {
        self.call(Method::DELETE, path, Vec::new()).await.map(drop)
    }

    pub async fn start_container(&self, id: &ProcessId, spec: &ContainerSpec) -> Result<Started, ApiError> {
        let bytes = self.post(&format!("/v1/containers/{id}/start"), spec).await?;
        Ok(serde_json::from_slice(&bytes).unwrap())
    }

    /// Starts a process in a container.
    pub async fn exec(&self, container: &ProcessId, process: ProcessSpec) -> Result<ProcessId, ApiError> {
        let id = new_id();
        let spec = ExecSpec { container: container.clone(), process, privileged: false };
        self.post(&format!("/v1/execs/{id}"), &spec).await?;
        Ok(id)
    }

    pub async fn signal(&self, id: &ProcessId, signal: i32) -> Result<(), ApiError> {
        let signal = Signal { signal: signal as u8 };
        self.post(&format!("/v1/processes/{id}/signal"), &signal).await.map(drop)
    }

    /// Runs a container to its end and removes it.
    pub async fn run(&self, spec: &ContainerSpec) -> Result<Output, ApiError> {
        let id = new_id();
        self.start_container(&id, spec).await?;
        let output = self.output(&id).await;
        self.delete(&format!("/v1/processes/{id}")).await.unwrap();
        self.delete(&format!("/v1/containers/{id}")).await.unwrap();
        Ok(output)
    }

    /// A connection that speaks another protocol from now on.
    pub async fn upgrade(&self, path: &str, protocol: &str) -> Upgraded {
        let request = Request::builder()
            .uri(path)
            .header(header::HOST, "agent")
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, protocol)
            .body(Full::new(Bytes::new()))
            .unwrap();
        let response = self.connect().await.send_request(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
        TokioIo::new(hyper::upgrade::on(response).await.unwrap())
    }

    pub async fn open_output(&self, id: &ProcessId, after: u64) -> Upgraded {
        self.upgrade(&format!("/v1/processes/{id}/output?after={after}"), OUTPUT_PROTOCOL).await
    }

    pub async fn open_stdin(&self, id: &ProcessId) -> Upgraded {
        self.upgrade(&format!("/v1/processes/{id}/stdin"), STDIN_PROTOCOL).await
    }

    /// Everything a process writes until its end, acknowledged as it comes.
    pub async fn output(&self, id: &ProcessId) -> Output {
        let mut stream = self.open_output(id, 0).await;
        let mut output = Output::default();
        while let Some((header, payload)) = next_frame(&mut stream).await {
            stream.write_all(&Ack(header.sequence).encode()).await.unwrap();
            output.add(header, &payload);
        }
        output
    }

    /// Ends the agent; it must leave with success.
    pub async fn shut_down(mut self) {
        self.post("/v1/shutdown", &()).await.unwrap();
        let mut rest = Vec::new();
        self.ready.read_to_end(&mut rest).await.unwrap();
        assert!(self.child.wait().unwrap().success());
    }

    /// Kills the agent as nothing else can.
    pub async fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Output {
    pub fn add(&mut self, header: Header, payload: &[u8]) {
        if let Some(last) = self.frames.last() {
            assert_eq!(header.sequence, last.sequence + 1);
            assert!(header.unix_nanos > last.unix_nanos);
        }
        self.frames.push(header);
        match header.kind {
            Kind::Stdout => self.stdout.extend(payload),
            Kind::Stderr => self.stderr.extend(payload),
            Kind::Exit => self.exit = Some(decode_exit(payload).unwrap()),
            Kind::End => assert!(self.exit.is_some()),
        }
    }
}

/// The next frame, or `None` when the agent closes the stream.
pub async fn next_frame(stream: &mut Upgraded) -> Option<(Header, Vec<u8>)> {
    let mut bytes = [0; HEADER_LEN];
    stream.read_exact(&mut bytes).await.ok()?;
    let header = Header::decode(&bytes).unwrap();
    let mut payload = vec![0; header.len as usize];
    stream.read_exact(&mut payload).await.unwrap();
    Some((header, payload))
}

/// Reads frames until the output so far contains a text.
pub async fn read_until(stream: &mut Upgraded, output: &mut Output, text: &str) {
    while !output.text().contains(text) {
        let (header, payload) = next_frame(stream).await.expect("the text comes before the end");
        stream.write_all(&Ack(header.sequence).encode()).await.unwrap();
        output.add(header, &payload);
    }
}

impl Drop for TestAgent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
