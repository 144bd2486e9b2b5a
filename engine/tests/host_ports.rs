//! Published ports through the stock docker CLI, with curl as the client on loopback and on this machine's own address. Needs root.

mod support;

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use support::{Daemon, Machine, text, with_busybox};

/// A port of the host that no one has.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// What curl gets; nothing if it fails.
fn get(url: &str) -> Option<String> {
    let output =
        Command::new("curl").args(["--silent", "--max-time", "10", "--noproxy", "*", url]).output().unwrap();
    output.status.success().then(|| text(&output.stdout))
}

/// Waits until something is so; the daemon hears of listeners by events, a moment after the container has done it.
fn soon(what: &str, mut so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !so() {
        assert!(begun.elapsed() < Duration::from_secs(10), "never: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn is_refused(address: &str) -> bool {
    TcpStream::connect(address).is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
}

/// This machine's own address, if it has one besides loopback.
fn own_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    // Nothing is sent.
    socket.connect("192.0.2.1:9").ok()?;
    socket
        .local_addr()
        .ok()
        .map(|address| address.ip())
        .filter(|ip| !ip.is_loopback() && !ip.is_unspecified())
}

fn sh(daemon: &Daemon, container: &str, script: &str) {
    daemon.ok(&["exec", "-d", container, "busybox", "sh", "-c", script]);
}

const SERVE: &str = "mkdir -p /www; echo ahoy > /www/index.html; echo $$ > /pid; exec busybox httpd -f -vv -p 80 -h /www > /proc/1/fd/1 2>&1";

#[test]
fn a_port_is_refused_until_the_container_listens_and_again_when_it_stops() {
    let (_machine, daemon) = with_busybox();
    let port = free_port();
    let (published, address) = (format!("{port}:80"), format!("127.0.0.1:{port}"));
    daemon.ok(&["run", "-d", "--name", "web", "-p", &published, "busybox", "sleep", "1000"]);
    assert!(is_refused(&address));
    assert!(TcpListener::bind(("127.0.0.1", port)).is_err(), "the port is taken all the same");
    assert_eq!(daemon.ok(&["port", "web", "80"]), format!("0.0.0.0:{port}\n[::]:{port}\n"));
    let ports = daemon.ok(&["ps", "--format", "{{.Ports}}"]);
    assert!(ports.contains(&format!("0.0.0.0:{port}->80/tcp")), "{ports}");
    assert_eq!(daemon.ok(&["ps", "-q", "--filter", &format!("publish={port}")]).lines().count(), 1);

    sh(&daemon, "web", SERVE);
    soon("the page is served", || get(&format!("http://{address}/")).as_deref() == Some("ahoy\n"));
    assert_eq!(get(&format!("http://[::1]:{port}/")).as_deref(), Some("ahoy\n"));
    soon("the log names the gateway", || daemon.ok(&["logs", "web"]).contains("172.17.0.1"));
    if let Some(own) = own_address() {
        assert_eq!(get(&format!("http://{own}:{port}/")).as_deref(), Some("ahoy\n"));
        soon("the log names the client", || daemon.ok(&["logs", "web"]).contains(&own.to_string()));
    }
    daemon.ok(&["exec", "web", "busybox", "sh", "-c", "kill $(cat /pid)"]);
    soon("it is refused again", || is_refused(&address));
    sh(&daemon, "web", SERVE);
    soon("it is served again", || get(&format!("http://{address}/")).is_some());
    daemon.ok(&["rm", "-f", "web"]);
    assert!(is_refused(&address));
    drop(TcpListener::bind(("127.0.0.1", port)).expect("the port is free"));
}

#[test]
fn bytes_pass_in_both_directions_with_half_closes() {
    let (_machine, daemon) = with_busybox();
    let port = free_port();
    let published = format!("127.0.0.1:{port}:7");
    daemon.ok(&[
        "run", "-d", "--name", "echo", "-p", &published, "busybox", "busybox", "nc", "-ll", "-p", "7", "-e",
        "cat",
    ]);
    let address = format!("127.0.0.1:{port}");
    soon("it listens", || TcpStream::connect(&address).is_ok());
    let mut stream = TcpStream::connect(&address).unwrap();
    let sent: Vec<u8> = (0..8u32 << 20).map(|at| (at ^ (at >> 8)) as u8).collect();
    let mut writer = stream.try_clone().unwrap();
    let copy = sent.clone();
    let writing = thread::spawn(move || {
        writer.write_all(&copy).unwrap();
        writer.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    writing.join().unwrap();
    assert!(received == sent, "{} of {} bytes", received.len(), sent.len());
}

/// A connection from a certain port of a certain address.
fn connect_from(from: SocketAddr, to: SocketAddr) -> TcpStream {
    use rustix::net::{AddressFamily, SocketType, bind, connect, socket, sockopt};
    let family = if from.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket(family, SocketType::STREAM, None).unwrap();
    sockopt::set_socket_reuseaddr(&socket, true).unwrap();
    bind(&socket, &from).unwrap();
    connect(&socket, &to).unwrap();
    socket.into()
}

#[test]
fn a_client_can_come_from_one_port_to_two_ports_that_are_the_same_in_the_container() {
    let (_machine, daemon) = with_busybox();
    let own = own_address().expect("this machine has an address besides loopback");
    let ports = [free_port(), free_port()];
    let [one, two] = ports.map(|port| format!("{port}:7"));
    let serve = ["busybox", "busybox", "nc", "-ll", "-p", "7", "-e", "cat"];
    daemon.ok(&[&["run", "-d", "-p", &one, "-p", &two][..], &serve].concat());
    soon("it listens", || ports.iter().all(|port| TcpStream::connect((own, *port)).is_ok()));
    let from = SocketAddr::new(own, free_port());
    let mut streams = ports.map(|port| connect_from(from, SocketAddr::new(own, port)));
    for stream in &mut streams {
        stream.write_all(b"ahoy").unwrap();
        let mut back = [0; 4];
        stream.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"ahoy");
    }
}

#[test]
fn ports_that_are_taken_or_make_no_sense_are_clear_errors_before_the_start() {
    let (_machine, daemon) = with_busybox();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let run = |option: &str, code: i32| daemon.fails(code, &["run", "--rm", "-p", option, "busybox", "true"]);
    let refusal = run(&format!("127.0.0.1:{port}:80"), 125);
    assert!(refusal.contains("driver failed programming external connectivity on endpoint"), "{refusal}");
    assert!(
        refusal.contains(&format!("Bind for 127.0.0.1:{port} failed: port is already allocated")),
        "{refusal}"
    );
    let free = free_port();
    daemon.ok(&["run", "-d", "--name", "one", "-p", &format!("{free}:80"), "busybox", "sleep", "1000"]);
    assert!(run(&format!("127.0.0.1:{free}:80"), 125).contains("port is already allocated"));
    assert!(run("192.0.2.7:8080:80", 125).contains("cannot assign requested address"));
    assert!(run("80:80/sctp", 125).contains("publishing SCTP ports is not supported by Coracle"));
    let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
    let udp = taken.local_addr().unwrap().port();
    assert!(run(&format!("127.0.0.1:{udp}:80/udp"), 125).contains("port is already allocated"));
    // Any of a range, and any at all.
    daemon.ok(&[
        "run",
        "-d",
        "--name",
        "range",
        "-p",
        &format!("127.0.0.1:{port}-{}:80", port.saturating_add(20)),
        "busybox",
        "sleep",
        "1000",
    ]);
    let shown = daemon.ok(&["port", "range"]);
    assert!(shown.starts_with("80/tcp -> 127.0.0.1:") && !shown.contains(&format!(":{port}\n")), "{shown}");
    let any = ["run", "-d", "--name", "any", "-P", "--expose", "81", "--expose", "82/udp"];
    daemon.ok(&[&any[..], &["busybox", "sleep", "1000"]].concat());
    let shown = daemon.ok(&["port", "any"]);
    assert!(shown.contains("81/tcp -> 0.0.0.0:") && shown.contains("82/udp -> 0.0.0.0:"), "{shown}");
    let host = daemon.docker(&["run", "-d", "--network", "host", "-p", "1:1", "busybox", "true"]);
    assert!(text(&host.stderr).contains("Published ports are discarded"), "{}", text(&host.stderr));
}

#[test]
fn published_ports_survive_the_daemon_and_come_back_with_the_container() {
    let machine = Machine::new();
    let daemon = Daemon::start(&machine);
    daemon.load_busybox();
    daemon.ok(&["run", "-d", "--name", "web", "-p", "127.0.0.1::80", "busybox", "sh", "-c", SERVE]);
    let address = daemon.ok(&["port", "web", "80"]).trim().to_owned();
    soon("it is served", || get(&format!("http://{address}/")).is_some());
    daemon.end();
    assert!(is_refused(&address));
    let daemon = Daemon::start(&machine);
    assert_eq!(daemon.ok(&["port", "web", "80"]).trim(), address);
    soon("it is served by the next daemon", || get(&format!("http://{address}/")).is_some());
    daemon.ok(&["restart", "-t", "0", "web"]);
    assert_eq!(daemon.ok(&["port", "web", "80"]).trim(), address);
    soon("it is served after a restart", || get(&format!("http://{address}/")).is_some());
    daemon.ok(&["stop", "-t", "0", "web"]);
    assert!(is_refused(&address));
    assert_eq!(daemon.ok(&["port", "web"]), "");
}

/// Serves datagrams in a container's network, at port 53 of all its addresses, until one is `end`: each answer is the asker's address and
/// what it said.
fn serve_datagrams(daemon: &Daemon, container: &str) -> thread::JoinHandle<()> {
    let pid = daemon.ok(&["inspect", "--format", "{{.State.Pid}}", container]);
    let namespace = std::fs::File::open(format!("/proc/{}/ns/net", pid.trim())).unwrap();
    let (ready, begun) = std::sync::mpsc::channel();
    let server = thread::spawn(move || {
        use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        let socket = UdpSocket::bind("[::]:53").unwrap();
        ready.send(()).unwrap();
        let mut buffer = vec![0; 65_535];
        loop {
            let (len, from) = socket.recv_from(&mut buffer).unwrap();
            let seen = SocketAddr::new(from.ip().to_canonical(), from.port());
            let said = [format!("{seen} ").as_bytes(), &buffer[..len.min(1000)]].concat();
            socket.send_to(if len > 1000 { &buffer[..len] } else { &said }, from).unwrap();
            if &buffer[..len] == b"end" {
                return;
            }
        }
    });
    begun.recv().unwrap();
    server
}

fn client(address: &str) -> UdpSocket {
    let socket = UdpSocket::bind(address).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    socket
}

/// Asks until there is an answer, as those must who use datagrams; the answer, which comes from where it was asked.
fn ask(socket: &UdpSocket, to: &str, what: &[u8]) -> Vec<u8> {
    let mut buffer = vec![0; 65_535];
    for _ in 0..10 {
        socket.send_to(what, to).unwrap();
        if let Ok((len, from)) = socket.recv_from(&mut buffer) {
            assert_eq!(from.to_string(), to);
            return buffer[..len].to_vec();
        }
    }
    panic!("no answer from {to}");
}

#[test]
fn datagrams_come_with_their_clients_address_and_their_answers_go_back() {
    let machine = Machine::new();
    let daemon = Daemon::start(&machine);
    daemon.load_busybox();
    let port = free_port();
    let (udp, tcp) = (format!("{port}:53/udp"), format!("{port}:53/tcp"));
    daemon.ok(&["run", "-d", "--name", "names", "-p", &udp, "-p", &tcp, "busybox", "sleep", "1000"]);
    let ports = daemon.ok(&["port", "names"]);
    for line in [format!("53/tcp -> 0.0.0.0:{port}\n"), format!("53/udp -> [::]:{port}\n")] {
        assert!(ports.contains(&line), "{ports}");
    }
    let shown = daemon.ok(&["ps", "--format", "{{.Ports}}", "--filter", &format!("publish={port}/udp")]);
    assert!(shown.contains(&format!("0.0.0.0:{port}->53/udp")), "{shown}");
    assert!(UdpSocket::bind(("0.0.0.0", port)).is_err());
    // Before anything takes them, they are lost, and nothing else is.
    let early = client("127.0.0.1:0");
    for _ in 0..3 {
        early.send_to(b"lost", ("127.0.0.1", port)).unwrap();
    }
    let server = serve_datagrams(&daemon, "names");
    let loopback = format!("127.0.0.1:{port}");
    let said = String::from_utf8(ask(&early, &loopback, b"ahoy")).unwrap();
    assert!(said.starts_with("172.17.0.1:") && said.ends_with(" ahoy"), "{said}");
    let other = client("127.0.0.1:0");
    let said = ask(&other, &format!("127.0.0.7:{port}"), b"ahoy");
    assert!(said.ends_with(b" ahoy"), "the answer comes from where it was asked");
    ask(&client("[::1]:0"), &format!("[::1]:{port}"), b"ahoy");
    let own = own_address().expect("this machine has an address besides loopback");
    let far = client(&format!("{own}:0"));
    let seen = format!("{} ahoy", far.local_addr().unwrap());
    assert_eq!(ask(&far, &format!("{own}:{port}"), b"ahoy"), seen.as_bytes());
    // As long as they get.
    let long: Vec<u8> = (0..65_000_u32).map(|at| (at ^ (at >> 8)) as u8).collect();
    assert!(ask(&early, &loopback, &long) == long);
    // Many clients at a time.
    let crowd: Vec<UdpSocket> = (0..200).map(|_| client("127.0.0.1:0")).collect();
    for socket in &crowd {
        assert!(ask(socket, &loopback, b"ahoy").ends_with(b" ahoy"));
    }
    // The next daemon goes on.
    daemon.end();
    let daemon = Daemon::start(&machine);
    assert_eq!(ask(&far, &format!("{own}:{port}"), b"ahoy"), seen.as_bytes());
    assert!(ask(&early, &loopback, b"end").ends_with(b" end"));
    server.join().unwrap();
    daemon.ok(&["restart", "-t", "0", "names"]);
    let server = serve_datagrams(&daemon, "names");
    assert_eq!(ask(&far, &format!("{own}:{port}"), b"ahoy"), seen.as_bytes());
    ask(&early, &loopback, b"end");
    server.join().unwrap();
    daemon.ok(&["rm", "-f", "names"]);
    UdpSocket::bind(("0.0.0.0", port)).expect("the port is free");
}
