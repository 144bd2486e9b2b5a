//! Names outside are asked of the host, the way the host itself asks: first its hosts file, then the name servers of its
//! `resolv.conf`, whose stub (systemd-resolved's, a VPN client's, dnsmasq) knows which server is asked for which domain. Messages
//! are passed on as they are, both ways, and both files are read for each question, so that no answer is older than the
//! host's own.
//!
//! An address of the host's loopback in the hosts file is one that leads to the host ([`HOST_V4`], [`HOST_V6`]): in a container
//! it would mean the container.

mod files;
mod message;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use coracle_agent_api::egress::{HOST_NAMES, HOST_V4, HOST_V6, Transport};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
};

pub use files::HostFiles;
use message::Worth;

/// However patient the host's resolver is told to be.
const MOST_TIME: Duration = Duration::from_secs(30);

/// The answer to a question, both whole messages; `None` if nobody answered.
pub(super) async fn resolve(files: &HostFiles, transport: Transport, question: &[u8]) -> Option<Vec<u8>> {
    if let Some(asked) = message::question(question) {
        let known = fixed(&asked.name);
        if !known.is_empty() {
            return Some(message::answer(question, &asked, &known));
        }
        let hosts = files::addresses(&files::read(&files.hosts).await, &asked.name);
        if !hosts.is_empty() {
            let seen: Vec<_> = hosts.into_iter().map(from_a_container).collect();
            return Some(message::answer(question, &asked, &seen));
        }
    }
    let servers = files::servers(&files.read_resolv_conf().await);
    tokio::time::timeout(MOST_TIME, ask_all(&servers, transport, question)).await.ok().flatten()
}

/// The name that a message asks for, in lower case.
pub(super) fn asked(question: &[u8]) -> Option<String> {
    message::question(question).map(|asked| asked.name)
}

/// The addresses in an answer, and for how many seconds they are good.
pub(super) fn addresses_in(answer: &[u8]) -> Vec<(IpAddr, u32)> {
    message::addresses(answer)
}

/// Names that mean the same everywhere.
fn fixed(name: &str) -> Vec<IpAddr> {
    if HOST_NAMES.contains(&name) {
        return vec![HOST_V4.into(), HOST_V6.into()];
    }
    if name == "localhost" || name.ends_with(".localhost") {
        return vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    }
    Vec::new()
}

fn from_a_container(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(ip) if ip.is_loopback() => HOST_V4.into(),
        IpAddr::V6(ip) if ip.is_loopback() => HOST_V6.into(),
        ip => ip,
    }
}

async fn ask_all(servers: &files::Servers, transport: Transport, question: &[u8]) -> Option<Vec<u8>> {
    let mut last = None;
    for _ in 0..servers.attempts {
        for server in &servers.addresses {
            let asked = async {
                match transport {
                    Transport::Udp => ask_by_datagram(*server, question).await,
                    Transport::Tcp => ask_by_stream(*server, question).await,
                }
            };
            let Ok(Ok(answer)) = tokio::time::timeout(servers.timeout, asked).await else { continue };
            match message::answers(&answer, question) {
                Some(Worth::Final) => return Some(answer),
                Some(Worth::Last) => last = Some(answer),
                None => {}
            }
        }
        if last.is_some() {
            break;
        }
    }
    last
}

async fn ask_by_datagram(server: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    // A new port for each question, which only that server can answer to.
    let any: IpAddr =
        if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(question).await?;
    let mut answer = vec![0; 65_535];
    loop {
        let len = socket.recv(&mut answer).await?;
        if message::answers(&answer[..len], question).is_some() {
            answer.truncate(len);
            return Ok(answer);
        }
    }
}

async fn ask_by_stream(server: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let len = u16::try_from(question.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut stream = TcpStream::connect(server).await?;
    stream.write_all(&[&len.to_be_bytes(), question].concat()).await?;
    let len = stream.read_u16().await?;
    let mut answer = vec![0; len.into()];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUESTION: &[u8] = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x04ship\0\0\x01\0\x01";

    /// A name server that answers with this code, and this many bytes besides.
    async fn server(code: u8, more: usize) -> SocketAddr {
        let answer = move |question: &[u8]| {
            let mut answer = question.to_vec();
            answer[2] |= 0x80;
            answer[3] = code;
            answer.resize(question.len() + more, 7);
            answer
        };
        // One number for both protocols; another process may have the second.
        let (udp, tcp) = loop {
            let udp = UdpSocket::bind(("127.0.0.1", 0)).await.unwrap();
            let address = udp.local_addr().unwrap();
            if let Ok(tcp) = tokio::net::TcpListener::bind(address).await {
                break (udp, tcp);
            }
        };
        let address = udp.local_addr().unwrap();
        tokio::spawn(async move {
            let mut buffer = [0; 512];
            while let Ok((len, from)) = udp.recv_from(&mut buffer).await {
                // Another one's answer comes first.
                let mut wrong = answer(&buffer[..len]);
                wrong[0] ^= 1;
                udp.send_to(&wrong, from).await.unwrap();
                udp.send_to(&answer(&buffer[..len]), from).await.unwrap();
            }
        });
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = tcp.accept().await {
                let mut question = vec![0; stream.read_u16().await.unwrap().into()];
                stream.read_exact(&mut question).await.unwrap();
                let answer = answer(&question);
                stream.write_u16(answer.len() as u16).await.unwrap();
                stream.write_all(&answer).await.unwrap();
            }
        });
        address
    }

    async fn ask(addresses: Vec<SocketAddr>, transport: Transport) -> Option<Vec<u8>> {
        let servers = files::Servers { addresses, timeout: Duration::from_millis(300), attempts: 1 };
        ask_all(&servers, transport, QUESTION).await
    }

    #[tokio::test]
    async fn the_servers_answer_is_passed_on_as_it_is() {
        const NO_SUCH_NAME: u8 = 3;
        let address = server(NO_SUCH_NAME, 60_000).await;
        for transport in [Transport::Udp, Transport::Tcp] {
            let answer = ask(vec![address], transport).await.unwrap();
            assert_eq!(
                (answer.len(), answer[..2].to_vec(), answer[3]),
                (QUESTION.len() + 60_000, vec![0x12, 0x34], 3)
            );
        }
    }

    #[tokio::test]
    async fn a_server_that_fails_has_the_next_one_asked() {
        const SERVER_FAILURE: u8 = 2;
        let (bad, good) = (server(SERVER_FAILURE, 0).await, server(0, 4).await);
        let silent = UdpSocket::bind(("127.0.0.1", 0)).await.unwrap();
        let silent = silent.local_addr().map(|address| (silent, address)).unwrap();
        assert_eq!(ask(vec![bad, good], Transport::Udp).await.unwrap()[3], 0);
        assert_eq!(ask(vec![silent.1, good], Transport::Udp).await.unwrap()[3], 0);
        assert_eq!(ask(vec![bad, silent.1], Transport::Udp).await.unwrap()[3], SERVER_FAILURE);
        assert_eq!(ask(vec![silent.1], Transport::Udp).await, None);
    }

    #[tokio::test]
    async fn the_hosts_file_is_asked_first_and_again_each_time() {
        let folder = tempfile::tempdir().unwrap();
        let files = HostFiles { resolv_conf: folder.path().join("none"), hosts: folder.path().join("hosts") };
        for (line, octets) in [("10.9.8.7 ship", [10, 9, 8, 7]), ("127.0.1.1 ship", [192, 168, 65, 254])] {
            std::fs::write(&files.hosts, line).unwrap();
            let answer = resolve(&files, Transport::Udp, QUESTION).await.unwrap();
            assert!(answer.ends_with(&octets), "{line}: {answer:?}");
        }
    }
}
