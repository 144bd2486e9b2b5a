//! A registry that answers as a test tells it, honestly or not, over real sockets on loopback; and images to serve.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use coracle_image_store::Digest;
use serde_json::{Value, json};

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Seen {
    pub method: String,
    /// With the query; a whole URL if a proxy was meant.
    pub path: String,
    pub headers: HashMap<String, String>,
    pub body: Vec<u8>,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

#[derive(Debug, Clone)]
pub enum Content {
    Whole(Vec<u8>),
    /// Claims more than it sends, then closes.
    Cut {
        bytes: Vec<u8>,
        length: usize,
    },
    /// Chunks without end.
    Endless,
    /// A byte range at a time.
    Slow {
        bytes: Vec<u8>,
        piece: usize,
        pause: Duration,
    },
    /// Says how long it will be, sends this, and then nothing.
    Stalled {
        bytes: Vec<u8>,
        length: usize,
    },
}

#[derive(Debug, Clone)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub content: Content,
}

impl Reply {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: Vec::new(), content: Content::Whole(body.into()) }
    }

    pub fn json(value: &Value) -> Self {
        Self::new(200, value.to_string()).with("Content-Type", "application/json")
    }

    pub fn content(content: Content) -> Self {
        Self { status: 200, headers: Vec::new(), content }
    }

    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn refusal(status: u16, code: &str) -> Self {
        let errors =
            json!({ "errors": [{ "code": code, "message": code.to_lowercase().replace('_', " ") }] });
        Self { status, ..Self::json(&errors) }
    }
}

/// A server for as long as it lives; its threads end with their connections.
pub struct Double {
    pub address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Double {
    pub fn start(answer: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let answer = Arc::new(answer);
        let log = Arc::clone(&seen);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (Ok(stream), answer, log) = (stream, Arc::clone(&answer), Arc::clone(&log)) else {
                    return;
                };
                // An error is a client that has gone.
                thread::spawn(move || drop(serve(&stream, &*answer, &log)));
            }
        });
        Self { address, seen }
    }

    /// `127.0.0.1:port`.
    pub fn domain(&self) -> String {
        self.address.to_string()
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// Requests whose path contains this.
    pub fn count(&self, part: &str) -> usize {
        self.seen().iter().filter(|seen| seen.path.contains(part)).count()
    }
}

fn serve(
    stream: &TcpStream,
    answer: &(dyn Fn(&Seen) -> Reply + Send + Sync),
    log: &Mutex<Vec<Seen>>,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    while let Some(seen) = read_request(&mut reader)? {
        log.lock().unwrap().push(seen.clone());
        let reply = answer(&seen);
        if !write_reply(stream, &reply, seen.method == "HEAD")? {
            return Ok(());
        }
    }
    Ok(())
}

fn read_request(reader: &mut BufReader<&TcpStream>) -> std::io::Result<Option<Seen>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    // What speaks TLS to a server that does not gets an answer that is none.
    let mut words = line.split(' ').map(str::to_owned);
    let (Some(method), Some(path)) = (words.next(), words.next()) else { return Ok(None) };
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        match line.trim_end().split_once(": ") {
            Some((name, value)) => drop(headers.insert(name.to_lowercase(), value.to_owned())),
            None => break,
        }
    }
    let length = headers.get("content-length").map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    Ok(Some(Seen { method, path, headers, body }))
}

/// False: the connection is to be closed.
fn write_reply(mut stream: &TcpStream, reply: &Reply, is_head: bool) -> std::io::Result<bool> {
    let mut head = format!("HTTP/1.1 {} Whatever\r\n", reply.status);
    for (name, value) in &reply.headers {
        head += &format!("{name}: {value}\r\n");
    }
    let length = match &reply.content {
        Content::Whole(bytes) | Content::Slow { bytes, .. } => Some(bytes.len()),
        Content::Cut { length, .. } | Content::Stalled { length, .. } => Some(*length),
        Content::Endless => None,
    };
    head += &match length {
        Some(length) => format!("Content-Length: {length}\r\n\r\n"),
        None => "Transfer-Encoding: chunked\r\n\r\n".to_owned(),
    };
    stream.write_all(head.as_bytes())?;
    if is_head {
        return Ok(true);
    }
    match &reply.content {
        Content::Whole(bytes) => stream.write_all(bytes)?,
        Content::Cut { bytes, .. } => {
            stream.write_all(bytes)?;
            return Ok(false);
        }
        Content::Slow { bytes, piece, pause } => {
            for piece in bytes.chunks(*piece) {
                stream.write_all(piece)?;
                thread::sleep(*pause);
            }
        }
        Content::Stalled { bytes, .. } => {
            stream.write_all(bytes)?;
            // Until the client has had enough.
            let _ = stream.read(&mut [0; 1]);
            return Ok(false);
        }
        Content::Endless => loop {
            stream.write_all(format!("4000\r\n{}\r\n", "x".repeat(0x4000)).as_bytes())?;
        },
    }
    Ok(true)
}

/// An image to be served under any repository's name.
#[derive(Debug, Clone)]
pub struct Image {
    pub manifest: Vec<u8>,
    pub manifest_type: String,
    pub config: Vec<u8>,
    pub layers: Vec<Vec<u8>>,
}

pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

impl Image {
    /// From layers' tar streams, packed with gzip.
    pub fn new(platform: &str, layers: &[Vec<u8>]) -> Self {
        let packed = layers.iter().map(|tar| gzip(tar)).collect();
        Self::packed(platform, layers, packed, "application/vnd.docker.image.rootfs.diff.tar.gzip")
    }

    /// From layers that are packed already.
    pub fn packed(platform: &str, tars: &[Vec<u8>], layers: Vec<Vec<u8>>, layer_type: &str) -> Self {
        let (os, architecture) = platform.split_once('/').unwrap();
        let diff_ids: Vec<_> = tars.iter().map(|tar| Digest::of(tar)).collect();
        let config = json!({
            "os": os, "architecture": architecture, "config": { "Cmd": ["sh"] },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        })
        .to_string()
        .into_bytes();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": DOCKER_MANIFEST,
            "config": descriptor("application/vnd.docker.container.image.v1+json", &config),
            "layers": layers.iter().map(|layer| descriptor(layer_type, layer)).collect::<Vec<_>>(),
        })
        .to_string()
        .into_bytes();
        Self { manifest, manifest_type: DOCKER_MANIFEST.to_owned(), config, layers }
    }

    /// With one change to its manifest.
    pub fn edit(mut self, change: impl FnOnce(&mut Value)) -> Self {
        let mut manifest = serde_json::from_slice(&self.manifest).unwrap();
        change(&mut manifest);
        self.manifest = manifest.to_string().into_bytes();
        self
    }

    pub fn layer_digest(&self, index: usize) -> Digest {
        Digest::of(&self.layers[index])
    }

    fn blob(&self, path: &str) -> Option<&Vec<u8>> {
        let (_, digest) = path.rsplit_once("/blobs/")?;
        std::iter::once(&self.config).chain(&self.layers).find(|blob| Digest::of(blob).to_string() == digest)
    }

    /// What an honest registry says.
    pub fn serve(&self, seen: &Seen) -> Reply {
        let path = seen.path.as_str();
        if path == "/v2/" {
            return Reply::json(&json!({}));
        }
        if path.contains("/manifests/") {
            let digest = Digest::of(&self.manifest).to_string();
            return Reply::new(200, self.manifest.clone())
                .with("Content-Type", &self.manifest_type)
                .with("Docker-Content-Digest", &digest);
        }
        let Some(blob) = self.blob(path) else { return Reply::refusal(404, "BLOB_UNKNOWN") };
        match range(seen) {
            Some(from) => {
                let total = blob.len();
                let range = format!("bytes {from}-{}/{total}", total - 1);
                Reply { status: 206, ..Reply::new(206, &blob[from..]) }.with("Content-Range", &range)
            }
            None => Reply::new(200, blob.clone()),
        }
    }
}

/// Where a request wants to resume.
pub fn range(seen: &Seen) -> Option<usize> {
    seen.header("range")?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
}

pub fn descriptor(kind: &str, blob: &[u8]) -> Value {
    json!({ "mediaType": kind, "size": blob.len(), "digest": Digest::of(blob) })
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}
