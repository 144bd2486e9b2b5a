//! The containers' name server, at 127.0.0.11 in each container's network namespace. It knows the containers on the networks that
//! the asker is on; everything else is asked of the host, or of the servers that the container was given.
//!
//! Its sockets are on a port that was free, and two rules in the namespace lead port 53 there, so that a container can have a
//! server of its own on port 53. Whoever may change the rules of its own namespace can be without names, and no more.

pub(crate) mod directory;
pub(crate) mod message;

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener as StdTcpListener, UdpSocket as StdUdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use coracle_agent_api::ProcessId;
use coracle_agent_api::egress::Transport;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::namespace::Namespace;
use super::nft::{Batch, Family, Header, Hook, Meta, Rule};
use directory::Directory;
use message::{Code, Question};

/// Where containers find it.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);
const PORT: u16 = 53;
const TABLE: &str = "coracle-names";
/// The kernel's place for changes of destinations (`NF_IP_PRI_NAT_DST`).
const PRIORITY_NAT: i32 = -100;
/// The longest message.
const MAX_MESSAGE: usize = 65_535;
/// Questions of one container that are under way at a time; further datagrams are dropped, as a full socket would.
const MAX_QUESTIONS: usize = 256;
/// Connections of one container at a time.
const MAX_CONNECTIONS: usize = 32;
/// A connection on which nothing is asked for so long is closed.
const IDLE: Duration = Duration::from_secs(30);
/// How long one server is waited for, as in Docker.
const PATIENCE: Duration = Duration::from_secs(4);
/// Servers that are asked at most.
const MAX_SERVERS: usize = 3;

/// An answer that comes later; none if there is no one who could give it.
pub(crate) type Answer<'a> = Pin<Box<dyn Future<Output = Option<Vec<u8>>> + Send + 'a>>;

/// Whoever knows what the containers' names are not.
pub(crate) trait Upstream: Send + Sync {
    /// Asks for a container: both are whole messages, and the answer has the question's id.
    fn ask<'a>(&'a self, container: &'a ProcessId, transport: Transport, question: Vec<u8>) -> Answer<'a>;
}

/// What one container's server answers from.
struct Resolver {
    container: ProcessId,
    directory: Arc<Directory>,
    upstream: Arc<dyn Upstream>,
    /// Asked instead of the host, from the container's namespace.
    servers: Vec<IpAddr>,
    namespace: Arc<Namespace>,
    questions: Arc<Semaphore>,
    connections: Arc<Semaphore>,
}

/// A running server, which ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Server(Vec<JoinHandle<()>>);

impl Drop for Server {
    fn drop(&mut self) {
        for task in &self.0 {
            task.abort();
        }
    }
}

/// The sockets of a server, made in a namespace.
pub(crate) struct Sockets {
    udp: StdUdpSocket,
    tcp: StdTcpListener,
}

impl Sockets {
    /// Makes them, and leads port 53 to them. Blocks.
    pub(crate) fn open(namespace: &Namespace) -> io::Result<Self> {
        namespace.run(|| {
            let udp = StdUdpSocket::bind((ADDRESS, 0))?;
            let tcp = StdTcpListener::bind((ADDRESS, 0))?;
            udp.set_nonblocking(true)?;
            tcp.set_nonblocking(true)?;
            rules(udp.local_addr()?.port(), tcp.local_addr()?.port()).commit()?;
            Ok(Self { udp, tcp })
        })
    }
}

fn rules(udp: u16, tcp: u16) -> Batch {
    let lead = |protocol: i32, port: u16| {
        Rule::new()
            .bytes_are(Header::Network, 16, &ADDRESS.octets())
            .meta_is(Meta::Protocol, &[u8::try_from(protocol).unwrap_or_default()])
            .bytes_are(Header::Transport, 2, &PORT.to_be_bytes())
            .destination(ADDRESS.into(), port)
    };
    Batch::new_table(Family::Ipv4, TABLE)
        .chain("output", "nat", Hook::Output, PRIORITY_NAT)
        .rule("output", lead(libc::IPPROTO_UDP, udp))
        .rule("output", lead(libc::IPPROTO_TCP, tcp))
}

/// What a server is made of, besides its sockets.
pub(crate) struct Knowledge {
    pub container: ProcessId,
    pub directory: Arc<Directory>,
    pub upstream: Arc<dyn Upstream>,
    pub servers: Vec<IpAddr>,
}

/// Serves a container.
pub(crate) fn serve(sockets: Sockets, namespace: Arc<Namespace>, knowledge: Knowledge) -> io::Result<Server> {
    let Knowledge { container, directory, upstream, servers } = knowledge;
    let resolver = Arc::new(Resolver {
        container,
        directory,
        upstream,
        servers,
        namespace,
        questions: Arc::new(Semaphore::new(MAX_QUESTIONS)),
        connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
    });
    let udp = UdpSocket::from_std(sockets.udp)?;
    let tcp = TcpListener::from_std(sockets.tcp)?;
    let datagrams = tokio::spawn(datagrams(resolver.clone(), Arc::new(udp)));
    Ok(Server(vec![datagrams, tokio::spawn(connections(resolver, tcp))]))
}

async fn datagrams(resolver: Arc<Resolver>, socket: Arc<UdpSocket>) {
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        // An error is that of an earlier answer, whose asker is gone.
        let Ok((len, asker)) = socket.recv_from(&mut buffer).await else { continue };
        let Ok(permit) = resolver.questions.clone().try_acquire_owned() else { continue };
        let request = buffer[..len].to_vec();
        let (resolver, socket) = (resolver.clone(), socket.clone());
        tokio::spawn(async move {
            if let Some(answer) = resolver.answer(Transport::Udp, request).await {
                let _ = socket.send_to(&answer, asker).await;
            }
            drop(permit);
        });
    }
}

async fn connections(resolver: Arc<Resolver>, listener: TcpListener) {
    loop {
        let Ok(permit) = resolver.connections.clone().acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else { continue };
        let resolver = resolver.clone();
        tokio::spawn(async move {
            let _ = connection(&resolver, stream).await;
            drop(permit);
        });
    }
}

/// Answers what is asked over a connection, one question after the other.
async fn connection(resolver: &Resolver, mut stream: TcpStream) -> io::Result<()> {
    loop {
        let Some(request) = timeout(IDLE, read_message(&mut stream)).await.map_err(io::Error::other)?? else {
            return Ok(());
        };
        let Some(answer) = resolver.answer(Transport::Tcp, request).await else { return Ok(()) };
        timeout(IDLE, write_message(&mut stream, &answer)).await.map_err(io::Error::other)??;
    }
}

async fn read_message(stream: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let len = match stream.read_u16().await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        len => len?,
    };
    let mut message = vec![0; usize::from(len)];
    stream.read_exact(&mut message).await?;
    Ok(Some(message))
}

async fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let len = u16::try_from(message.len()).map_err(io::Error::other)?;
    stream.write_all(&[&len.to_be_bytes(), message].concat()).await
}

impl Resolver {
    /// The answer to a request; none to what is no request.
    async fn answer(&self, transport: Transport, request: Vec<u8>) -> Option<Vec<u8>> {
        let question = match Question::read(&request) {
            Ok(question) => question,
            Err(answer) => return answer,
        };
        let known = match question.address() {
            Some(address) => {
                let name = self.directory.name(&self.container, &address);
                name.map(|name| question.name_is(&name))
            }
            // A name that is known has what is known of it and no more: no one else is asked.
            None => {
                let addresses = self.directory.addresses(&self.container, &question.name);
                addresses.map(|addresses| question.addresses(&addresses))
            }
        };
        let answer = match known {
            Some(answer) => answer,
            None => {
                let told = self.ask_others(transport, request.clone()).await;
                // An answer to something else would be taken for one to this.
                match told.filter(|told| told.len() >= 12 && told[..2] == request[..2]) {
                    Some(told) => told,
                    None => question.nothing(Code::ServerFailure),
                }
            }
        };
        Some(if transport == Transport::Udp { question.cut(answer) } else { answer })
    }

    async fn ask_others(&self, transport: Transport, request: Vec<u8>) -> Option<Vec<u8>> {
        if self.servers.is_empty() {
            return self.upstream.ask(&self.container, transport, request).await;
        }
        let mut last = None;
        for server in self.servers.iter().take(MAX_SERVERS) {
            let asked = timeout(PATIENCE, self.ask_server(transport, *server, &request)).await;
            if let Ok(Ok(answer)) = asked {
                // The next one may know better than one that failed or refuses.
                let failed = answer.get(3).is_none_or(|flags| matches!(flags & 0x0f, 2 | 5));
                if !failed {
                    return Some(answer);
                }
                last = Some(answer);
            }
        }
        last
    }

    async fn ask_server(&self, transport: Transport, server: IpAddr, request: &[u8]) -> io::Result<Vec<u8>> {
        let target = SocketAddr::new(server, PORT);
        match transport {
            Transport::Udp => {
                let socket = self.socket_to(move || {
                    let any: SocketAddr =
                        if server.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
                    let socket = StdUdpSocket::bind(any)?;
                    socket.set_nonblocking(true)?;
                    socket.connect(target)?;
                    Ok(socket)
                });
                let socket = UdpSocket::from_std(socket.await?)?;
                socket.send(request).await?;
                let mut answer = vec![0; MAX_MESSAGE];
                loop {
                    let len = socket.recv(&mut answer).await?;
                    if answer.get(..2) == request.get(..2) {
                        answer.truncate(len);
                        return Ok(answer);
                    }
                }
            }
            Transport::Tcp => {
                // Connecting blocks a thread of its own, for as long as one server is waited for.
                let socket = self.socket_to(move || {
                    let stream = std::net::TcpStream::connect_timeout(&target, PATIENCE)?;
                    stream.set_nonblocking(true)?;
                    Ok(stream)
                });
                let mut stream = TcpStream::from_std(socket.await?)?;
                write_message(&mut stream, request).await?;
                read_message(&mut stream).await?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
            }
        }
    }

    /// Makes a socket in the container's namespace.
    async fn socket_to<T: Send + 'static>(
        &self,
        make: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let namespace = self.namespace.clone();
        tokio::task::spawn_blocking(move || namespace.run(make)).await.map_err(io::Error::other)?
    }
}
