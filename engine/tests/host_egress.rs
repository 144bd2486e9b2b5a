//! What containers reach outside, and what they see when it fails: the same as a process on the host sees. The client is the kernel of
//! a container's network namespace, used by threads of the test; the other side are servers on the host's loopback.

mod support;

use std::{
    fs::File,
    io::{self, ErrorKind, Read, Write},
    net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd,
    thread,
    time::Duration,
};

use coracle_agent_api::egress::{HOST_V4, HOST_V6};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use support::Daemon;

const PATIENCE: Duration = Duration::from_secs(20);

/// A container that idles; its network namespace.
fn idle(daemon: &Daemon) -> File {
    idle_with(daemon, &[])
}

fn idle_with(daemon: &Daemon, options: &[&str]) -> File {
    let id = daemon.ok(&[&["run", "-d"], options, &["busybox", "sleep", "1000"]].concat());
    let pid = daemon.ok(&["inspect", "--format", "{{.State.Pid}}", id.trim()]);
    File::open(format!("/proc/{}/ns/net", pid.trim())).unwrap()
}

/// Runs code as a process in the container would, as far as the network goes.
fn inside<T: Send>(namespace: &File, code: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            code()
        });
        thread.join().unwrap()
    })
}

/// The host's loopback addresses, each with the one that containers know it by.
fn loopbacks() -> [(SocketAddr, SocketAddr); 2] {
    [
        ((Ipv4Addr::LOCALHOST, 0).into(), (HOST_V4, 0).into()),
        ((Ipv6Addr::LOCALHOST, 0).into(), (HOST_V6, 0).into()),
    ]
}

/// A server on each loopback, with what it does with a connection; the addresses for containers.
fn serve(handle: fn(TcpStream)) -> Vec<SocketAddr> {
    let start = |(real, seen): (SocketAddr, SocketAddr)| {
        let listener = TcpListener::bind(real).unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                thread::spawn(move || handle(stream));
            }
        });
        SocketAddr::new(seen.ip(), port)
    };
    loopbacks().map(start).to_vec()
}

fn echo(mut stream: TcpStream) {
    let mut copy = stream.try_clone().unwrap();
    let _ = io::copy(&mut stream, &mut copy);
}

fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// A port that nobody listens on.
fn unused(real: SocketAddr, seen: SocketAddr) -> SocketAddr {
    let port = TcpListener::bind(real).unwrap().local_addr().unwrap().port();
    SocketAddr::new(seen.ip(), port)
}

#[test]
fn connections_fail_as_they_fail_on_the_host() {
    let (_machine, daemon) = support::with_busybox();
    let container = idle(&daemon);
    for (real, seen) in loopbacks() {
        let refused = inside(&container, || connect(unused(real, seen)));
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::ConnectionRefused, "{seen}");
    }
    let link_local = inside(&container, || connect("169.254.169.254:80".parse().unwrap()));
    assert_eq!(link_local.unwrap_err().kind(), ErrorKind::HostUnreachable);
    // A listener whose queue is full lets nobody know that it is there.
    let full = TcpListener::bind("127.0.0.1:0").unwrap();
    rustix::net::listen(&full, 0).unwrap();
    let address = full.local_addr().unwrap();
    let _first = TcpStream::connect(address).unwrap();
    let seen = SocketAddr::new(HOST_V4.into(), address.port());
    let silent = inside(&container, || TcpStream::connect_timeout(&seen, Duration::from_secs(1)));
    assert_eq!(silent.unwrap_err().kind(), ErrorKind::TimedOut);
}

#[test]
fn bytes_come_back_as_they_went_and_ends_pass_through() {
    let (_machine, daemon) = support::with_busybox();
    let container = idle(&daemon);
    let all: Vec<u8> = (0..8_u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for server in serve(echo) {
        let back = inside(&container, || {
            let mut stream = connect(server).unwrap();
            let mut reader = stream.try_clone().unwrap();
            thread::scope(|scope| {
                let back = scope.spawn(move || {
                    let mut back = Vec::new();
                    reader.read_to_end(&mut back).unwrap();
                    back
                });
                stream.write_all(&all).unwrap();
                // The server sends until it has seen our end; only then it ends, too.
                stream.shutdown(Shutdown::Write).unwrap();
                back.join().unwrap()
            })
        });
        assert!(back == all, "{server}: {} bytes came back", back.len());
    }
}

#[test]
fn resets_pass_through_both_ways() {
    let (_machine, daemon) = support::with_busybox();
    let container = idle(&daemon);
    let reset = |stream: TcpStream| {
        rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
    };
    for server in serve(|mut stream| {
        stream.read_exact(&mut [0]).unwrap();
        rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
    }) {
        let read = inside(&container, || {
            let mut stream = connect(server).unwrap();
            stream.write_all(b"x").unwrap();
            stream.read(&mut [0])
        });
        assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset, "{server}");
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let seen = SocketAddr::new(HOST_V4.into(), listener.local_addr().unwrap().port());
    inside(&container, || reset(connect(seen).unwrap()));
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn datagrams_come_back_and_refusals_too() {
    let (_machine, daemon) = support::with_busybox();
    let container = idle(&daemon);
    for (real, seen) in loopbacks() {
        let server = UdpSocket::bind(real).unwrap();
        let seen = SocketAddr::new(seen.ip(), server.local_addr().unwrap().port());
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        let any: SocketAddr = if real.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().unwrap();
        let client = inside(&container, || {
            let client = UdpSocket::bind(any).unwrap();
            client.connect(seen).unwrap();
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            client
        });
        let mut buffer = vec![0; 65_536];
        for size in [0, 1, 1400, 60_000] {
            client.send(&vec![7; size]).unwrap();
            let (len, from) = server.recv_from(&mut buffer).unwrap();
            server.send_to(&buffer[..len], from).unwrap();
            assert_eq!(client.recv(&mut buffer).unwrap(), size, "{seen}");
        }
        drop(server);
        client.send(b"is anybody there?").unwrap();
        assert_eq!(client.recv(&mut buffer).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{seen}");
    }
}

#[test]
fn hundreds_of_connections_are_open_at_once() {
    let (_machine, daemon) = support::with_busybox();
    let container = idle(&daemon);
    let server = serve(echo)[0];
    inside(&container, || {
        let mut streams: Vec<_> = (0..500).map(|_| connect(server).unwrap()).collect();
        for (number, stream) in streams.iter_mut().enumerate() {
            stream.write_all(&number.to_be_bytes()).unwrap();
        }
        for (number, stream) in streams.iter_mut().enumerate() {
            let mut back = [0; size_of::<usize>()];
            stream.read_exact(&mut back).unwrap();
            assert_eq!(usize::from_be_bytes(back), number);
        }
    });
}

#[test]
fn connections_outlive_the_daemon_and_the_next_one_makes_new_ones() {
    let (machine, daemon) = support::with_busybox();
    let container = idle(&daemon);
    let server = serve(echo)[0];
    let ask = |stream: &mut TcpStream| {
        let mut back = [0; 4];
        stream.write_all(b"ahoy").unwrap();
        stream.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"ahoy");
    };
    let mut stream = inside(&container, || connect(server).unwrap());
    ask(&mut stream);
    daemon.end();
    ask(&mut stream);
    let _daemon = Daemon::start(&machine);
    ask(&mut stream);
    ask(&mut inside(&container, || connect(server).unwrap()));
}

#[test]
fn a_container_fetches_what_the_host_serves() {
    let (_machine, daemon) = support::with_busybox();
    let server = serve(|mut stream| {
        let mut head = [0; 4096];
        let _ = stream.read(&mut head).unwrap();
        stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nahoy\n").unwrap();
    })[0];
    let address = format!("http://{server}/");
    assert_eq!(
        daemon.ok(&["run", "--rm", "busybox", "busybox", "wget", "-q", "-O", "-", &address]),
        "ahoy\n"
    );
    daemon.fails(
        1,
        &["run", "--rm", "--network", "none", "busybox", "busybox", "wget", "-q", "-O", "-", &address],
    );
}

#[test]
fn a_label_says_where_a_container_may_connect_to() {
    let (_machine, daemon) = support::with_busybox();
    let server = serve(echo)[0];
    let cases = [
        ("open", "all", true),
        ("shut", "none", false),
        ("listed", "192.168.65.0/24,x.example", true),
        ("elsewhere", "10.0.0.0/8", false),
    ];
    for (name, policy, allowed) in cases {
        let label = format!("coracle.egress={policy}");
        let container = idle_with(&daemon, &["--name", name, "--label", &label]);
        let connected = inside(&container, || connect(server));
        match allowed {
            true => drop(connected.unwrap()),
            false => assert_eq!(connected.unwrap_err().kind(), ErrorKind::HostUnreachable, "{policy}"),
        }
        let (status, lines) = daemon.api("GET", &format!("/coracle/egress?container={name}"), "");
        assert_eq!(status, 200, "{lines}");
        let lines: serde_json::Value = serde_json::from_str(&lines).unwrap();
        assert_eq!(lines.as_array().unwrap().len(), 1, "{lines}");
        assert_eq!(lines[0]["Allowed"], allowed, "{lines}");
        assert_eq!(lines[0]["Destination"], server.to_string(), "{lines}");
    }
    let refused =
        daemon.fails(125, &["run", "--rm", "--label", "coracle.egress=10.0.0.0/33", "busybox", "true"]);
    assert!(refused.contains("coracle.egress") && refused.contains("10.0.0.0/33"), "{refused}");
}

/// A name server on a loopback address of its own, which answers every question of type A with the same address.
fn name_server(ip: &str) {
    let socket = UdpSocket::bind((ip, 53)).expect("port 53 is for root, and nobody else has this address");
    thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((len, from)) = socket.recv_from(&mut buffer) {
            let mut answer = buffer[..len].to_vec();
            answer[2] |= 0x80;
            if answer[len - 4..len - 2] == [0, 1] {
                answer[7] = 1;
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 10, 9, 8, 7]);
            }
            let _ = socket.send_to(&answer, from);
        }
    });
}

#[test]
fn names_are_those_that_the_host_has() {
    let machine = support::Machine::new();
    let folder = machine.home.path().to_owned();
    let (resolv_conf, hosts) = (folder.join("resolv.conf"), folder.join("hosts"));
    name_server("127.77.4.1");
    std::fs::write(&resolv_conf, "nameserver 127.77.4.1\n").unwrap();
    std::fs::write(&hosts, "10.1.2.3 boat\n127.0.1.1 self\n").unwrap();
    *machine.host_files.lock().unwrap() = coracle_engine::HostFiles { resolv_conf, hosts: hosts.clone() };
    let daemon = Daemon::start(&machine);
    daemon.load_busybox();
    let options =
        ["--name", "asker", "--label", "coracle.egress=ship.example,boat,self,host.docker.internal"];
    daemon.ok(&["network", "create", "sea"]);
    daemon.ok(&[&["run", "-d", "--network", "sea"], &options[..], &["busybox", "sleep", "1000"]].concat());
    let look_up = |name: &str| {
        let output = daemon.docker(&["exec", "asker", "busybox", "nslookup", name, "127.0.0.11"]);
        support::text(&output.stdout)
    };
    for (name, address) in [
        ("ship.example", "10.9.8.7"),
        ("boat", "10.1.2.3"),
        ("self", "192.168.65.254"),
        ("host.docker.internal", "192.168.65.254"),
    ] {
        assert!(look_up(name).contains(address), "{name}: {}", look_up(name));
    }
    assert!(!look_up("other.example").contains("10.9.8.7"), "a name that is not listed");
    // A change is noticed at once.
    std::fs::write(&hosts, "10.3.2.1 boat\n").unwrap();
    assert!(look_up("boat").contains("10.3.2.1"), "{}", look_up("boat"));
    // What a listed name was answered with can be reached.
    let server = serve(echo)[0];
    let script = format!("echo ahoy | busybox nc host.docker.internal {}", server.port());
    assert_eq!(daemon.ok(&["exec", "asker", "sh", "-c", &script]), "ahoy\n");
    let (_, lines) = daemon.api("GET", "/coracle/egress?container=asker", "");
    assert!(lines.contains("\"Host\":\"other.example\",\"Allowed\":false"), "{lines}");
    assert!(lines.contains("\"Host\":\"host.docker.internal\",\"Allowed\":true"), "{lines}");
}

#[test]
fn the_host_can_have_another_name() {
    let (_machine, daemon) = support::with_busybox();
    let added =
        daemon.ok(&["run", "--rm", "--add-host", "ashore:host-gateway", "busybox", "cat", "/etc/hosts"]);
    assert!(added.contains("192.168.65.254\tashore"), "{added}");
}

#[test]
fn the_host_is_found_at_either_of_its_loopback_addresses() {
    let (_machine, daemon) = support::with_busybox();
    let [four, six] = serve(echo)[..] else { panic!("two") };
    for (address, port) in [("fdc4:f303:9324::254", four.port()), ("192.168.65.254", six.port())] {
        let script = format!("echo ahoy | busybox nc {address} {port}");
        assert_eq!(daemon.ok(&["run", "--rm", "busybox", "sh", "-c", &script]), "ahoy\n");
    }
}

#[test]
fn containers_with_the_hosts_network_ask_for_names_each_as_itself() {
    let (_machine, daemon) = support::with_busybox();
    let up = |name: &str, options: &[&str]| {
        let common = ["run", "-d", "--network", "host", "--name", name];
        daemon.ok(&[&common[..], options, &["busybox", "sleep", "1000"]].concat());
    };
    up("gone", &[]);
    up("silent", &["--label", "coracle.egress=none"]);
    up("free", &[]);
    daemon.ok(&["rm", "-f", "gone"]);
    let finds_the_host = |name: &str| {
        let lookup = ["exec", name, "busybox", "nslookup", "host.docker.internal", "127.0.0.11"];
        support::text(&daemon.docker(&lookup).stdout).contains(&HOST_V4.to_string())
    };
    assert!(finds_the_host("free") && !finds_the_host("silent") && finds_the_host("free"));
}
