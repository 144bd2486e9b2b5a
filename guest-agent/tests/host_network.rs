//! Networks of containers. Needs root; everything happens in the network namespace of the agent.

mod support;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use coracle_agent_api::egress::{EGRESS_PROTOCOL, HEADER_LEN, Header, Reply, Request};
use coracle_agent_api::*;
use support::{Image, TestAgent, Upgraded, container, new_id, process, shell};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn network(number: u8) -> NetworkId {
    format!("{number:064x}").parse().unwrap()
}

fn bridge(number: u8) -> Bridge {
    Bridge {
        network: network(number),
        name: format!("net{number}"),
        interface: format!("br-{number}"),
        addresses: vec![
            format!("172.30.{number}.1/24").parse().unwrap(),
            format!("fd00:{number}::1/64").parse().unwrap(),
        ],
        internal: false,
        isolated: false,
        mtu: None,
    }
}

fn endpoint(bridge: Bridge, last: u8, interface: &str) -> Endpoint {
    let net = |address: &ipnet::IpNet| match address {
        ipnet::IpNet::V4(net) => {
            let [a, b, c, _] = net.addr().octets();
            format!("{a}.{b}.{c}.{last}/24").parse().unwrap()
        }
        ipnet::IpNet::V6(net) => {
            let mut segments = net.addr().segments();
            segments[7] = last.into();
            format!("{}/64", std::net::Ipv6Addr::from(segments)).parse().unwrap()
        }
    };
    Endpoint {
        interface: interface.to_owned(),
        mac: Mac([2, 0x42, 0, 0, 0, last]),
        addresses: bridge.addresses.iter().map(net).collect(),
        gateways: if bridge.internal {
            vec![]
        } else {
            bridge.addresses.iter().map(|net| net.addr()).collect()
        },
        bridge,
        names: vec![format!("host{last}")],
        links: [("linked".to_owned(), "host3".to_owned())].into(),
    }
}

async fn started(agent: &TestAgent, endpoints: Vec<Endpoint>) -> ProcessId {
    let id = new_id();
    let mut spec = container(&[Image::busybox()], process(&["sleep", "1000"]));
    spec.network = Network::Endpoints(endpoints);
    agent.start_container(&id, &spec).await.unwrap();
    id
}

async fn sh(agent: &TestAgent, id: &ProcessId, script: &str) -> String {
    let exec = agent.exec(id, shell(script)).await.unwrap();
    let output = agent.output(&exec).await;
    format!("{}{}", output.text(), String::from_utf8_lossy(&output.stderr))
}

/// `yes` for each address that answers, `no` for each that does not.
async fn pings(agent: &TestAgent, id: &ProcessId, addresses: &[&str]) -> String {
    let script = addresses
        .iter()
        .map(|address| format!("busybox ping -c 1 -W 1 {address} > /tmp/said 2>&1 && echo yes || echo no; "));
    sh(agent, id, &script.collect::<String>()).await.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[tokio::test]
async fn containers_on_a_bridge_reach_each_other_and_the_gateway() {
    let agent = TestAgent::start().await;
    let one = started(&agent, vec![endpoint(bridge(1), 2, "eth0")]).await;
    let two = started(&agent, vec![endpoint(bridge(1), 3, "eth0")]).await;
    for id in [&one, &two] {
        let all =
            ["127.0.0.1", "172.30.1.1", "172.30.1.2", "172.30.1.3", "fd00:1::1", "fd00:1::2", "fd00:1::3"];
        assert_eq!(pings(&agent, id, &all).await, "yes yes yes yes yes yes yes");
    }
    let script = "cat /sys/class/net/eth0/address; busybox ip route; busybox ip -6 route | grep default; ls /sys/class/net";
    let said = sh(&agent, &one, script).await;
    let lines: Vec<&str> = said.lines().map(str::trim).collect();
    assert_eq!(
        lines,
        [
            "02:42:00:00:00:02",
            "default via 172.30.1.1 dev eth0",
            "172.30.1.0/24 dev eth0 scope link  src 172.30.1.2",
            "default via fd00:1::1 dev eth0  metric 1024",
            "eth0",
            "lo"
        ]
    );
}

#[tokio::test]
async fn networks_do_not_see_each_other_unless_a_container_is_on_both() {
    let agent = TestAgent::start().await;
    let one = started(&agent, vec![endpoint(bridge(1), 2, "eth0")]).await;
    let two = started(&agent, vec![endpoint(bridge(2), 2, "eth0")]).await;
    assert_eq!(pings(&agent, &one, &["172.30.2.2", "fd00:2::2"]).await, "no no");
    let further = endpoint(bridge(2), 9, "eth1");
    agent.post(&format!("/v1/containers/{one}/endpoints"), &further).await.unwrap();
    assert_eq!(pings(&agent, &one, &["172.30.2.2", "fd00:2::2", "172.30.1.1"]).await, "yes yes yes");
    assert_eq!(pings(&agent, &two, &["172.30.2.9", "172.30.1.2"]).await, "yes no");
    let again = agent.post(&format!("/v1/containers/{one}/endpoints"), &further).await.unwrap_err();
    assert_eq!(again.kind, ErrorKind::Conflict);
    let in_use = agent.delete(&format!("/v1/networks/{}", network(2))).await.unwrap_err();
    assert_eq!(in_use.kind, ErrorKind::Conflict);
    agent.delete(&format!("/v1/containers/{one}/endpoints/{}", network(2))).await.unwrap();
    assert_eq!(sh(&agent, &one, "ls /sys/class/net").await, "eth0\nlo\n");
    assert_eq!(pings(&agent, &one, &["172.30.2.2"]).await, "no");
}

#[tokio::test]
async fn what_is_isolated_sees_the_gateway_only_and_what_is_internal_has_no_way_out() {
    let agent = TestAgent::start().await;
    let isolated = Bridge { isolated: true, ..bridge(1) };
    let one = started(&agent, vec![endpoint(isolated.clone(), 2, "eth0")]).await;
    let _two = started(&agent, vec![endpoint(isolated, 3, "eth0")]).await;
    assert_eq!(pings(&agent, &one, &["172.30.1.3", "172.30.1.1"]).await, "no yes");
    let internal = Bridge { internal: true, ..bridge(3) };
    let one = started(&agent, vec![endpoint(internal.clone(), 2, "eth0")]).await;
    let _two = started(&agent, vec![endpoint(internal, 3, "eth0")]).await;
    assert_eq!(pings(&agent, &one, &["172.30.3.3", "172.30.1.1", "192.0.2.1"]).await, "yes no no");
}

#[tokio::test]
async fn names_are_resolved_and_port_53_stays_free() {
    let agent = TestAgent::start().await;
    let one = started(&agent, vec![endpoint(bridge(1), 2, "eth0")]).await;
    let _two = started(&agent, vec![endpoint(bridge(1), 3, "eth0")]).await;
    let ask = async |name: &str| sh(&agent, &one, &format!("nslookup {name} 127.0.0.11 2>&1")).await;
    for name in ["host3", "HOST3", "host3.net1", "linked"] {
        let said = ask(name).await;
        assert!(said.contains("172.30.1.3") && said.contains("fd00:1::3"), "{name}: {said}");
    }
    let said = ask("nowhere.example").await;
    assert!(said.contains("SERVFAIL"), "{said}");
    let said = ask("172.30.1.3").await;
    assert!(said.contains("host3.net1"), "{said}");
    // A container's own server on all addresses of port 53.
    let script =
        "busybox nc -l -p 53 > /tmp/tcp 2>&1 < /dev/null & sleep 1; busybox netstat -ln | grep -c ':53 '";
    assert_eq!(sh(&agent, &one, script).await, "1\n");
    assert!(ask("host3").await.contains("172.30.1.3"));
    let names = vec!["other".to_owned()];
    agent.post(&format!("/v1/containers/{one}/endpoints/{}/names", network(1)), &names).await.unwrap();
    assert!(ask("other").await.contains("172.30.1.2"));
}

#[tokio::test]
async fn an_address_is_free_when_its_container_has_ended() {
    let agent = TestAgent::start().await;
    let one = started(&agent, vec![endpoint(bridge(1), 2, "eth0")]).await;
    let other = started(&agent, vec![endpoint(bridge(1), 3, "eth0")]).await;
    for id in [&one, &other] {
        agent.signal(id, libc::SIGKILL).await.unwrap();
        agent.output(id).await;
    }
    agent.delete(&format!("/v1/networks/{}", network(1))).await.unwrap();
    let again = started(&agent, vec![endpoint(bridge(1), 2, "eth0")]).await;
    assert_eq!(pings(&agent, &again, &["172.30.1.1", "172.30.1.3"]).await, "yes no");
}

#[tokio::test]
async fn namespaces_are_shared_with_a_container_or_the_guest() {
    let agent = TestAgent::start().await;
    let one = started(&agent, vec![endpoint(bridge(1), 2, "eth0")]).await;
    for (mode, expected) in [(Network::Container(one), "eth0\nlo\n"), (Network::Endpoints(vec![]), "lo\n")] {
        let mut spec = container(&[Image::busybox()], shell("ls /sys/class/net"));
        spec.network = mode;
        assert_eq!(agent.run(&spec).await.unwrap().text(), expected);
    }
    let mut spec = container(&[Image::busybox()], shell("ls /sys/class/net"));
    spec.network = Network::Host;
    let said = agent.run(&spec).await.unwrap().text();
    assert!(said.contains("br-1\n") && said.contains("veth"), "{said}");
    spec.network = Network::Container(new_id());
    assert_eq!(agent.run(&spec).await.unwrap_err().kind, ErrorKind::NotFound);
}

#[tokio::test]
async fn what_cannot_be_is_refused() {
    let agent = TestAgent::start().await;
    for name in ["", "a/b", "sixteen-letters-x", "lo", "..", "a b"] {
        let mut spec = container(&[Image::busybox()], process(&["true"]));
        spec.network =
            Network::Endpoints(vec![Endpoint { interface: name.to_owned(), ..endpoint(bridge(1), 2, "x") }]);
        assert_eq!(agent.run(&spec).await.unwrap_err().kind, ErrorKind::Invalid, "{name}");
    }
    // The name is taken by another network.
    let _one = started(&agent, vec![endpoint(bridge(1), 2, "eth0")]).await;
    let other = Bridge { network: network(7), ..bridge(1) };
    let mut spec = container(&[Image::busybox()], process(&["true"]));
    spec.network = Network::Endpoints(vec![endpoint(other, 3, "eth0")]);
    let error = agent.run(&spec).await.unwrap_err();
    assert!(error.message.contains("file exists"), "{error}");
}

async fn in_guest(agent: &TestAgent) -> ProcessId {
    let id = new_id();
    let mut spec = container(&[Image::busybox()], process(&["sleep", "1000"]));
    spec.network = Network::Host;
    agent.start_container(&id, &spec).await.unwrap();
    id
}

/// What comes of something that asks for names, while the daemon's end says of each that there is none; for which containers it was
/// asked.
async fn asked(daemon: &mut Upgraded, asking: impl Future<Output = String>) -> (String, Vec<ProcessId>) {
    let mut askers = BTreeSet::new();
    tokio::pin!(asking);
    loop {
        let mut header = [0; HEADER_LEN];
        tokio::select! {
            said = &mut asking => return (said, askers.into_iter().collect()),
            read = daemon.read_exact(&mut header) => drop(read.unwrap()),
        }
        let header = Header::decode(&header).unwrap();
        let mut payload = vec![0; header.len];
        daemon.read_exact(&mut payload).await.unwrap();
        if let Request::Question(asker, _, mut message) = Request::decode(header.kind, &payload).unwrap() {
            askers.insert(asker);
            (message[2], message[3]) = (0x81, 0x83);
            daemon.write_all(&Reply::Answer(message).encode(header.id)).await.unwrap();
        }
    }
}

/// A question for `example.org`, as printf(1) makes it.
const QUESTION: &str =
    r"\022\064\001\000\000\001\000\000\000\000\000\000\007example\003org\000\000\001\000\001";

/// Sends the question from a certain port, as a process of a container with the guest's network; the answer's length and sender.
async fn ask_from(agent: &TestAgent, id: &ProcessId, from: u16, port: u16) -> String {
    let script = format!(
        "import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(('127.0.0.1', {from}))
s.settimeout(5)
try:
    s.sendto(b'{QUESTION}', ('127.0.0.11', {port}))
    data, sender = s.recvfrom(600)
    print(len(data), sender[1])
except PermissionError:
    print('forbidden')"
    );
    let group = agent.cgroup().join(id.as_str()).join("cgroup.procs");
    let mut command = std::process::Command::new("nsenter");
    command.arg("--target").arg(agent.pid().to_string()).args(["--net", "sh", "-c"]);
    command.arg("echo $$ > $0 && exec python3 -c \"$1\"").arg(group).arg(script);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn each_container_with_the_guests_network_asks_for_names_as_itself() {
    let agent = TestAgent::start().await;
    let mut daemon = agent.upgrade("/v1/egress", EGRESS_PROTOCOL).await;
    let (first, one, two) = (in_guest(&agent).await, in_guest(&agent).await, in_guest(&agent).await);
    agent.signal(&first, libc::SIGKILL).await.unwrap();
    agent.output(&first).await;
    let stream = format!("printf '\\000\\035{QUESTION}' | busybox nc -w 5 127.0.0.11 53 | busybox wc -c");
    for id in [&one, &two, &one] {
        let lookup = sh(&agent, id, "nslookup example.org 127.0.0.11 2>&1");
        let (said, askers) = asked(&mut daemon, lookup).await;
        assert!(said.contains("NXDOMAIN") && askers == [id.clone()], "{askers:?}: {said}");
        let (said, askers) = asked(&mut daemon, sh(&agent, id, &stream)).await;
        assert_eq!((said.trim(), askers), ("31", vec![id.clone()]));
        // From a port that another one has just used.
        let (said, askers) = asked(&mut daemon, ask_from(&agent, id, 5353, 53)).await;
        assert_eq!((said.trim(), askers), ("29 53", vec![id.clone()]));
    }
    // No one gets at another one's server by its own port.
    let listed = "cat /proc/net/udp | grep -o '0B00007F:[0-9A-F]* 00000000:0000'";
    let ports = sh(&agent, &one, listed).await;
    let port = |line: &str| u16::from_str_radix(line.split([':', ' ']).nth(1).unwrap(), 16).unwrap();
    let ports: Vec<u16> = ports.lines().map(port).collect();
    assert_eq!(ports.len(), 2, "{ports:?}");
    for port in ports {
        let (said, askers) = asked(&mut daemon, ask_from(&agent, &one, 5353, port)).await;
        assert_eq!((said.trim(), askers), ("forbidden", vec![]));
    }
    let ports = sh(&agent, &one, &listed.replace("udp", "tcp")).await;
    for port in ports.lines().map(port) {
        let script = format!("printf '\\000\\035{QUESTION}' | busybox nc -w 1 127.0.0.11 {port} 2>&1");
        let (_, askers) = asked(&mut daemon, sh(&agent, &one, &script)).await;
        assert!(!askers.contains(&two), "{port}");
    }
    let mut spec = container(&[Image::busybox()], process(&["sleep", "1000"]));
    spec.network = Network::Container(one);
    let joined = new_id();
    agent.start_container(&joined, &spec).await.unwrap();
    let lookup = sh(&agent, &joined, "nslookup example.org 127.0.0.11 2>&1");
    let (_, askers) = asked(&mut daemon, lookup).await;
    assert_eq!(askers, vec![joined.clone()]);
}

#[tokio::test]
async fn name_servers_that_are_silent_hold_up_no_one() {
    let agent = TestAgent::start().await;
    let id = new_id();
    let mut spec = container(&[Image::busybox()], process(&["sleep", "1000"]));
    spec.network = Network::Endpoints(vec![endpoint(bridge(1), 2, "eth0")]);
    spec.name_servers = vec!["192.0.2.1".parse().unwrap(); 3];
    agent.start_container(&id, &spec).await.unwrap();
    let ask = format!(
        "(for n in $(busybox seq 30); do (printf '\\000\\035{QUESTION}'; sleep 20) | busybox nc 127.0.0.11 53 & done) > /tmp/said 2>&1 < /dev/null; sleep 1"
    );
    sh(&agent, &id, &ask).await;
    let begun = Instant::now();
    started(&agent, vec![endpoint(bridge(1), 3, "eth0")]).await;
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_bridge_that_could_not_be_made_can_be_made_later_and_becomes_what_it_shall_be() {
    let agent = TestAgent::start().await;
    let run = async |bridge: Bridge| {
        let mut spec = container(&[Image::busybox()], shell("cat /sys/class/net/eth0/mtu"));
        spec.network = Network::Endpoints(vec![endpoint(bridge, 9, "eth0")]);
        agent.run(&spec).await
    };
    let mut bad = bridge(1);
    bad.addresses.push("ff02::7/64".parse().unwrap());
    let error = run(Bridge { addresses: bad.addresses.clone(), ..bridge(1) }).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::StartFailed, "{error}");
    assert_eq!(run(bridge(1)).await.unwrap().text(), "1500\n");

    let look = in_guest(&agent).await;
    let seen = async |script: &str| sh(&agent, &look, script).await;
    let one = started(&agent, vec![endpoint(bridge(1), 2, "eth0")]).await;
    let changed = Bridge {
        internal: true,
        mtu: Some(1400),
        addresses: vec!["172.30.1.254/24".parse().unwrap()],
        ..bridge(1)
    };
    assert_eq!(run(changed.clone()).await.unwrap().text(), "1400\n");
    let group = seen("cat /sys/class/net/br-1/mtu /sys/class/net/br-1/netdev_group").await;
    assert_eq!(group, format!("1400\n{}\n", 0x0063_6f01));
    assert_eq!(pings(&agent, &one, &["172.30.1.254", "172.30.1.1"]).await, "yes no");
    let renamed = Bridge { interface: "other".to_owned(), ..changed };
    assert_eq!(run(renamed.clone()).await.unwrap_err().kind, ErrorKind::Conflict);
    agent.signal(&one, libc::SIGKILL).await.unwrap();
    agent.output(&one).await;
    agent.delete(&format!("/v1/networks/{}", network(9))).await.unwrap();
    run(renamed).await.unwrap();
    assert_eq!(seen("ls /sys/class/net | grep -c -e '^other$' -e '^br-1$'").await, "1\n");

    // Packets that are too short for IPv6.
    let short = Bridge { mtu: Some(1000), ..bridge(2) };
    assert_eq!(run(short.clone()).await.unwrap_err().kind, ErrorKind::Invalid);
    let short = Bridge { addresses: vec!["172.30.2.1/24".parse().unwrap()], ..short };
    assert_eq!(run(short).await.unwrap().text(), "1000\n");
}

#[tokio::test]
async fn a_container_is_called_something_only_where_it_is() {
    let agent = TestAgent::start().await;
    let one = started(&agent, vec![endpoint(bridge(1), 2, "eth0")]).await;
    let path = format!("/v1/containers/{one}/endpoints/{}/names", network(2));
    assert_eq!(agent.post(&path, &vec!["x".to_owned()]).await.unwrap_err().kind, ErrorKind::Conflict);
}
