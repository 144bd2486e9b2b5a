//! The containers' name server, at 127.0.0.11 in each container's network namespace. It knows the containers on the networks that
//! the asker is on; everything else is asked of the host, or of the servers that the container was given.
//!
//! Its sockets are on a port that was free, and two rules in the namespace lead port 53 there, so that a container can have a
//! server of its own on port 53. Whoever may change the rules of its own namespace can be without names, and no more.
//!
//! Containers that have the guest's own network share a namespace, and each of them still has a server of its own, which asks in its
//! name: by the cgroup that a socket was made in the rules tell whose question it is. Datagrams are led without connection tracking,
//! which would remember for which server a port was before its next user.

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
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::forward;
use super::namespace::Namespace;
use super::nft::{Batch, Family, Header, Hook, Meta, Rule, Verdict};
use crate::cgroup::Identity;
use crate::incoming::Descriptors;
use directory::Directory;
use message::{Code, Question};

/// Where containers find it.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);
const PORT: u16 = 53;
const TABLE: &str = "coracle-names";
/// The kernel's place for changes of destinations (`NF_IP_PRI_NAT_DST`).
const PRIORITY_NAT: i32 = -100;
const PRIORITY_FILTER: i32 = 0;
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
    descriptors: Arc<Descriptors>,
}

/// A running server, which ends when this is dropped. Dropping blocks for as long as the kernel works.
#[derive(Debug)]
pub(crate) struct Server {
    tasks: Vec<JoinHandle<()>>,
    _rules: Option<GuestRules>,
}

impl Drop for Server {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// A container's rules in the guest's namespace, which outlives the container: they go when this is dropped.
#[derive(Debug)]
struct GuestRules {
    table: String,
}

impl Drop for GuestRules {
    fn drop(&mut self) {
        if let Err(error) = Batch::without_table(Family::Ipv4, &self.table).commit() {
            tracing::warn!(table = self.table, "rules of a container's names cannot be removed: {error}");
        }
    }
}

/// The sockets of a server, made in a namespace.
pub(crate) struct Sockets {
    namespace: Arc<Namespace>,
    udp: StdUdpSocket,
    tcp: StdTcpListener,
    rules: Option<GuestRules>,
}

impl Sockets {
    /// Makes them in a container's namespace, and leads port 53 to them. Blocks.
    pub(crate) fn open(namespace: Arc<Namespace>) -> io::Result<Self> {
        namespace.clone().run(|| {
            let (udp, tcp) = bound()?;
            rules(udp.local_addr()?.port(), tcp.local_addr()?.port()).commit()?;
            Ok(Self { namespace, udp, tcp, rules: None })
        })
    }

    /// Makes them in the guest's namespace, which is the calling thread's, and leads port 53 to them for processes of one container.
    /// Blocks.
    pub(crate) fn open_in_guest(container: &ProcessId, group: Identity) -> io::Result<Self> {
        let namespace = Arc::new(Namespace::current()?);
        let (udp, tcp) = bound()?;
        let table = format!("{TABLE}-{container}");
        rules_of_one(&table, group, udp.local_addr()?.port(), tcp.local_addr()?.port()).commit()?;
        Ok(Self { namespace, udp, tcp, rules: Some(GuestRules { table }) })
    }
}

fn bound() -> io::Result<(StdUdpSocket, StdTcpListener)> {
    let udp = StdUdpSocket::bind((ADDRESS, 0))?;
    let tcp = StdTcpListener::bind((ADDRESS, 0))?;
    udp.set_nonblocking(true)?;
    tcp.set_nonblocking(true)?;
    Ok((udp, tcp))
}

const SOURCE: u32 = 12;
const DESTINATION: u32 = 16;
const SOURCE_PORT: u32 = 0;
const DESTINATION_PORT: u32 = 2;

/// Packets of a protocol from or to one of the server's ports.
fn packets(rule: Rule, protocol: i32, address_at: u32, port_at: u32, port: u16) -> Rule {
    rule.bytes_are(Header::Network, address_at, &ADDRESS.octets())
        .meta_is(Meta::Protocol, &[u8::try_from(protocol).unwrap_or_default()])
        .bytes_are(Header::Transport, port_at, &port.to_be_bytes())
}

fn asking(rule: Rule, protocol: i32, port: u16) -> Rule {
    packets(rule, protocol, DESTINATION, DESTINATION_PORT, port)
}

fn rules(udp: u16, tcp: u16) -> Batch {
    let lead = |protocol, port| asking(Rule::new(), protocol, PORT).destination(ADDRESS.into(), port);
    Batch::new_table(Family::Ipv4, TABLE)
        .chain("output", "nat", Hook::Output, PRIORITY_NAT)
        .rule("output", lead(libc::IPPROTO_UDP, udp))
        .rule("output", lead(libc::IPPROTO_TCP, tcp))
}

/// The same for one group of processes among others, who cannot ask its server in its stead.
fn rules_of_one(table: &str, group: Identity, udp: u16, tcp: u16) -> Batch {
    const FLAGS_AT: u32 = 13;
    /// SYN and ACK.
    const FLAGS: u8 = 0x12;
    const SYN: u8 = 0x02;
    let own = || Rule::new().comes_from_group(group.id, group.level);
    let answer = packets(Rule::new(), libc::IPPROTO_UDP, SOURCE, SOURCE_PORT, udp);
    let first = asking(Rule::new(), libc::IPPROTO_TCP, tcp).bits_are(Header::Transport, FLAGS_AT, FLAGS, SYN);
    Batch::new_table(Family::Ipv4, table)
        .chain("connections", "nat", Hook::Output, PRIORITY_NAT)
        .rule("connections", asking(own(), libc::IPPROTO_TCP, PORT).destination(ADDRESS.into(), tcp))
        .chain("output", "filter", Hook::Output, PRIORITY_FILTER)
        .rule("output", asking(own(), libc::IPPROTO_TCP, tcp).verdict(Verdict::Accept))
        .rule("output", first.verdict(Verdict::Drop))
        .rule(
            "output",
            asking(own(), libc::IPPROTO_UDP, PORT)
                .set_udp_port(DESTINATION_PORT, udp)
                .verdict(Verdict::Accept),
        )
        .rule("output", asking(Rule::new(), libc::IPPROTO_UDP, udp).verdict(Verdict::Drop))
        .rule("output", answer.set_udp_port(SOURCE_PORT, PORT).verdict(Verdict::Accept))
}

/// What a server is made of, besides its sockets.
pub(crate) struct Knowledge {
    pub container: ProcessId,
    pub directory: Arc<Directory>,
    pub upstream: Arc<dyn Upstream>,
    pub servers: Vec<IpAddr>,
    pub descriptors: Arc<Descriptors>,
}

/// Serves a container on threads of a runtime.
pub(crate) fn serve(sockets: Sockets, knowledge: Knowledge, runtime: &Handle) -> io::Result<Server> {
    let Knowledge { container, directory, upstream, servers, descriptors } = knowledge;
    let Sockets { namespace, udp, tcp, rules } = sockets;
    let resolver = Arc::new(Resolver {
        container,
        directory,
        upstream,
        servers,
        namespace,
        questions: Arc::new(Semaphore::new(MAX_QUESTIONS)),
        connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        descriptors,
    });
    let _entered = runtime.enter();
    let udp = UdpSocket::from_std(udp)?;
    let tcp = TcpListener::from_std(tcp)?;
    let datagrams = tokio::spawn(datagrams(resolver.clone(), Arc::new(udp)));
    Ok(Server { tasks: vec![datagrams, tokio::spawn(connections(resolver, tcp))], _rules: rules })
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
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => match resolver.descriptors.survive(error).await {
                Ok(()) => continue,
                Err(error) => return tracing::error!("a container's names are not served over TCP: {error}"),
            },
        };
        let resolver = resolver.clone();
        tokio::spawn(async move {
            let _ = connection(&resolver, stream).await;
            drop(permit);
            resolver.descriptors.were_freed();
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
                let socket = self.socket_to(move || forward::unconnected(server, None)).await?;
                let mut stream = TcpSocket::from_std_stream(socket.into()).connect(target).await?;
                write_message(&mut stream, request).await?;
                read_message(&mut stream).await?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
            }
        }
    }

    /// Makes a socket in the container's namespace, where it stays whoever uses it.
    async fn socket_to<T: Send + 'static>(
        &self,
        make: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let namespace = self.namespace.clone();
        tokio::task::spawn_blocking(move || namespace.run(make)).await.map_err(io::Error::other)?
    }
}
