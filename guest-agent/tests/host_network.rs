//! Networks of containers. Needs root; everything happens in the network namespace of the agent.

mod support;

use coracle_agent_api::*;
use support::{Image, TestAgent, container, new_id, process, shell};

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
