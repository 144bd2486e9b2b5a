//! A small blocking client of the agent's API, for benches that measure the agent without the engine.

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
};

use anyhow::{Context, Result, bail};
use coracle_agent_api::{
    ContainerSpec, DiffId, Layer, LayerSource, OUTPUT_PROTOCOL, ProcessSpec, Started,
    frame::{self, Header, Kind},
};

/// A connection to an agent, over a unix socket or over vsock.
pub trait Connection: Read + Write {
    /// Closes both directions.
    fn close(&self) -> io::Result<()>;
}

impl Connection for UnixStream {
    fn close(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Both)
    }
}

impl Connection for vsock::VsockStream {
    fn close(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Both)
    }
}

/// Sends a request and reads the answer's head; what follows is still in the connection.
fn request(
    connection: &mut dyn Connection,
    method: &str,
    path: &str,
    more: &str,
    body: &[u8],
) -> Result<(u16, usize)> {
    let length = body.len();
    let head = format!("{method} {path} HTTP/1.1\r\nhost: agent\r\ncontent-length: {length}\r\n{more}\r\n");
    connection.write_all(&[head.as_bytes(), body].concat())?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() > 16 * 1024 {
            bail!("the head of the answer to {method} {path} does not end");
        }
        let mut byte = [0];
        connection.read_exact(&mut byte).with_context(|| format!("no answer to {method} {path}"))?;
        head.push(byte[0]);
    }
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut response = httparse::Response::new(&mut headers);
    response.parse(&head)?;
    let length = response.headers.iter().find(|h| h.name.eq_ignore_ascii_case("content-length"));
    let length = length.map_or(Ok(0), |h| {
        std::str::from_utf8(h.value)?.trim().parse::<usize>().map_err(anyhow::Error::from)
    })?;
    Ok((response.code.context("an answer without a status")?, length))
}

/// Calls the agent; anything but success is an error with what the agent said.
pub fn call(connection: &mut dyn Connection, method: &str, path: &str, body: &[u8]) -> Result<Vec<u8>> {
    let (status, length) = request(connection, method, path, "", body)?;
    let mut answer = vec![0; length];
    connection.read_exact(&mut answer)?;
    if !(200..300).contains(&status) {
        bail!("{method} {path}: {status} {}", String::from_utf8_lossy(&answer));
    }
    Ok(answer)
}

/// Starts a container.
pub fn start(connection: &mut dyn Connection, id: &str, spec: &ContainerSpec) -> Result<Started> {
    let answer = call(connection, "POST", &format!("/v1/containers/{id}/start"), &serde_json::to_vec(spec)?)?;
    Ok(serde_json::from_slice(&answer)?)
}

/// Reads a process's output to its end on a connection of its own; `first` is called at the first byte. Returns the output
/// and the exit code.
pub fn output(connection: &mut dyn Connection, id: &str, first: &mut dyn FnMut()) -> Result<(Vec<u8>, u8)> {
    let upgrade = format!("connection: upgrade\r\nupgrade: {OUTPUT_PROTOCOL}\r\n");
    let (status, _) =
        request(connection, "GET", &format!("/v1/processes/{id}/output?after=0"), &upgrade, b"")?;
    if status != 101 {
        bail!("the output of {id} was not given: {status}");
    }
    let (mut output, mut code) = (Vec::new(), None);
    loop {
        let mut head = [0; frame::HEADER_LEN];
        connection.read_exact(&mut head)?;
        let header = Header::decode(&head)?;
        let mut payload = vec![0; header.len as usize];
        connection.read_exact(&mut payload)?;
        match header.kind {
            Kind::Stdout | Kind::Stderr => {
                if output.is_empty() {
                    first();
                }
                output.extend_from_slice(&payload);
            }
            Kind::Exit => code = Some(frame::decode_exit(&payload)?.code),
            Kind::End => break,
        }
    }
    connection.close()?;
    Ok((output, code.context("the output ended without an exit status")?))
}

/// A container of one layer that runs a command, with Docker's defaults.
pub fn container(diff_id: &DiffId, source: LayerSource, args: &[&str]) -> ContainerSpec {
    ContainerSpec {
        layers: vec![Layer { diff_id: diff_id.clone(), source }],
        hostname: "bench".to_owned(),
        process: ProcessSpec {
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            env: vec!["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()],
            cwd: "/".to_owned(),
            capabilities: ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID"].map(str::to_owned).to_vec(),
            ..ProcessSpec::default()
        },
        shm_size: 64 << 20,
        masked_paths: ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"]
            .map(str::to_owned)
            .to_vec(),
        readonly_paths: ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
            .map(str::to_owned)
            .to_vec(),
        ..ContainerSpec::default()
    }
}
