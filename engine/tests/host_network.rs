//! Networks through the stock docker CLI. Needs root; packets stay in the network namespace of the agent.

mod support;

use support::{Daemon, Machine, with_busybox};

/// Starts a container that stays.
fn up(daemon: &Daemon, name: &str, options: &[&str]) {
    let mut args = vec!["run", "-d", "--name", name];
    args.extend(options);
    args.extend(["busybox", "sleep", "1000"]);
    daemon.ok(&args);
}

fn address(daemon: &Daemon, container: &str, network: &str) -> String {
    let format = format!("{{{{(index .NetworkSettings.Networks \"{network}\").IPAddress}}}}");
    daemon.ok(&["inspect", "-f", &format, container]).trim().to_owned()
}

/// Whether one container reaches an address or a name.
fn reaches(daemon: &Daemon, container: &str, target: &str) -> bool {
    daemon.docker(&["exec", container, "busybox", "ping", "-c", "1", "-W", "1", target]).status.success()
}

#[test]
fn a_container_is_on_the_default_bridge_unless_it_says_otherwise() {
    let (_machine, daemon) = with_busybox();
    up(&daemon, "one", &[]);
    up(&daemon, "two", &[]);
    assert_eq!(address(&daemon, "one", "bridge"), "172.17.0.2");
    assert_eq!(address(&daemon, "two", "bridge"), "172.17.0.3");
    assert!(reaches(&daemon, "one", "172.17.0.3") && reaches(&daemon, "two", "172.17.0.1"));
    let format = "{{.NetworkSettings.IPAddress}} {{.NetworkSettings.Gateway}} {{.NetworkSettings.MacAddress}} {{.HostConfig.NetworkMode}}";
    assert_eq!(
        daemon.ok(&["inspect", "-f", format, "one"]),
        "172.17.0.2 172.17.0.1 02:42:ac:11:00:02 bridge\n"
    );
    let hosts = daemon.ok(&["exec", "one", "cat", "/etc/hosts"]);
    let short = daemon.ok(&["inspect", "-f", "{{.Config.Hostname}}", "one"]);
    assert!(hosts.contains(&format!("172.17.0.2\t{short}")), "{hosts}");
    let members = daemon.ok(&[
        "network",
        "inspect",
        "-f",
        "{{range .Containers}}{{.Name}} {{.IPv4Address}};{{end}}",
        "bridge",
    ]);
    for member in ["one 172.17.0.2/16;", "two 172.17.0.3/16;"] {
        assert!(members.contains(member), "{members}");
    }
    assert_eq!(daemon.ok(&["run", "--rm", "--network", "none", "busybox", "ls", "/sys/class/net"]), "lo\n");
    let host = daemon.ok(&["run", "--rm", "--network", "host", "busybox", "ls", "/sys/class/net"]);
    assert!(host.contains("docker0"), "{host}");
    let shared =
        ["run", "--rm", "--network", "container:one", "busybox", "cat", "/sys/class/net/eth0/address"];
    assert_eq!(daemon.ok(&shared), "02:42:ac:11:00:02\n");
    assert_eq!(
        daemon.ok(&["network", "ls", "--format", "{{.Name}} {{.Driver}}"]),
        "bridge bridge\nhost host\nnone null\n"
    );
}

#[test]
fn networks_of_ones_own_are_made_used_and_removed() {
    let (_machine, daemon) = with_busybox();
    let options = [
        "--subnet",
        "10.55.0.0/24",
        "--ip-range",
        "10.55.0.128/25",
        "--gateway",
        "10.55.0.254",
        "--label",
        "tier=db",
    ];
    let id = daemon.ok(&[&["network", "create"][..], &options, &["mine"]].concat());
    assert_eq!(id.trim().len(), 64);
    daemon.ok(&["network", "create", "--ipv6", "other"]);
    up(&daemon, "one", &["--network", "mine"]);
    up(&daemon, "two", &["--network", "mine", "--ip", "10.55.0.7", "--mac-address", "02:42:00:00:00:77"]);
    up(&daemon, "three", &["--network", "other"]);
    assert_eq!(address(&daemon, "one", "mine"), "10.55.0.128");
    assert_eq!(address(&daemon, "two", "mine"), "10.55.0.7");
    assert_eq!(daemon.ok(&["exec", "two", "cat", "/sys/class/net/eth0/address"]), "02:42:00:00:00:77\n");
    assert!(reaches(&daemon, "one", "10.55.0.7") && reaches(&daemon, "one", "10.55.0.254"));
    let three = address(&daemon, "three", "other");
    assert!(!reaches(&daemon, "one", &three));
    let v6 = daemon.ok(&[
        "inspect",
        "-f",
        "{{(index .NetworkSettings.Networks \"other\").GlobalIPv6Address}}",
        "three",
    ]);
    assert!(v6.starts_with("fd") && reaches(&daemon, "three", v6.trim()), "{v6}");

    daemon.ok(&["network", "connect", "other", "one"]);
    assert!(reaches(&daemon, "one", &three) && reaches(&daemon, "one", "10.55.0.7"));
    let again = daemon.fails(1, &["network", "connect", "other", "one"]);
    assert!(again.contains("endpoint with name one already exists in network other"), "{again}");
    let in_use = daemon.fails(1, &["network", "rm", "other"]);
    assert!(in_use.contains("has active endpoints"), "{in_use}");
    daemon.ok(&["network", "disconnect", "other", "one"]);
    assert!(!reaches(&daemon, "one", &three));
    assert_eq!(daemon.ok(&["network", "ls", "-q", "--no-trunc", "--filter", "label=tier=db"]), id);
    assert_eq!(daemon.ok(&["ps", "--format", "{{.Names}}", "--filter", "network=other"]), "three\n");

    daemon.ok(&["rm", "-f", "three"]);
    assert!(daemon.ok(&["network", "prune", "-f"]).contains("other"));
    daemon.ok(&["rm", "-f", "one", "two"]);
    assert_eq!(daemon.ok(&["network", "rm", "mine"]), "mine\n");
    assert!(daemon.fails(1, &["network", "inspect", "mine"]).contains("network mine not found"));
}

/// What the name server of a container says of a name.
fn ask(daemon: &Daemon, container: &str, name: &str) -> String {
    let output = daemon.docker(&["exec", container, "busybox", "nslookup", name, "127.0.0.11"]);
    support::text(&output.stdout)
}

#[test]
fn containers_find_each_other_by_name() {
    let (_machine, daemon) = with_busybox();
    daemon.ok(&["network", "create", "mine"]);
    up(&daemon, "db", &["--network", "mine", "--network-alias", "store", "--expose", "5432", "-e", "A=1"]);
    up(
        &daemon,
        "web",
        &[
            "--network",
            "mine",
            "--link",
            "db:sql",
            "--dns-search",
            "example.org",
            "--dns-option",
            "timeout:1",
        ],
    );
    let db = address(&daemon, "db", "mine");
    let short = daemon.ok(&["inspect", "-f", "{{.Config.Hostname}}", "db"]);
    for name in ["db", "store", "DB.mine", short.trim(), "sql"] {
        assert!(ask(&daemon, "web", name).contains(&db), "{name}: {}", ask(&daemon, "web", name));
    }
    assert!(reaches(&daemon, "web", "store"));
    assert!(!ask(&daemon, "db", "sql").contains(&db), "a link is known to the one that has it only");
    let resolv = daemon.ok(&["exec", "web", "cat", "/etc/resolv.conf"]);
    assert!(
        resolv.contains("nameserver 127.0.0.11\nsearch example.org\noptions timeout:1 ndots:0\n"),
        "{resolv}"
    );
    daemon.ok(&["rename", "db", "base"]);
    assert!(ask(&daemon, "web", "base").contains(&db) && !ask(&daemon, "web", "db").contains(&db));
    daemon.ok(&["stop", "-t", "0", "base"]);
    assert!(!ask(&daemon, "web", "store").contains(&db));
    // Not on the default bridge, but for links.
    up(&daemon, "plain", &["--expose", "80", "-e", "A=1"]);
    up(&daemon, "linked", &["--link", "plain:other"]);
    let plain = address(&daemon, "plain", "bridge");
    assert!(!ask(&daemon, "linked", "plain").contains(&plain));
    let said = daemon.ok(&["exec", "linked", "cat", "/etc/hosts"]);
    assert!(said.contains(&format!("{plain}\tother ")) && said.contains(" plain\n"), "{said}");
    let env = daemon.ok(&["exec", "linked", "cat", "/proc/1/environ"]).replace('\0', "\n");
    for line in
        [&format!("OTHER_PORT_80_TCP_ADDR={plain}\n"), "OTHER_NAME=/linked/other\n", "OTHER_ENV_A=1\n"]
    {
        assert!(env.contains(line), "{env}");
    }
    let refusal = daemon.fails(125, &["run", "--rm", "--link", "base:x", "busybox", "true"]);
    assert!(refusal.contains("Cannot link to a non running container: /base AS "), "{refusal}");
}

#[test]
fn what_cannot_be_is_refused_in_dockers_words() {
    let (_machine, daemon) = with_busybox();
    daemon.ok(&["network", "create", "--subnet", "10.66.0.0/24", "taken"]);
    for (options, words) in [
        (&["--subnet", "10.66.0.128/25", "x"][..], "Pool overlaps with other one on this address space"),
        (&["--subnet", "10.0.0.0/24", "--gateway", "10.1.0.1", "x"], "no matching subnet for gateway"),
        (&["--driver", "weave", "x"], "plugin \"weave\" not found"),
        (&["taken"], "network with name taken already exists"),
        (&["host"], "operation is not permitted on predefined host network"),
        (&["--subnet", "10.0.0.0/24", "--gateway", "10.0.0.255", "x"], "its broadcast address"),
        (&["--subnet", "192.168.65.0/24", "x"], "host.docker.internal"),
        (&["-o", "fly=yes", "x"], "the network option fly is not supported by Coracle yet"),
    ] {
        let refusal = daemon.fails(1, &[&["network", "create"], options].concat());
        assert!(refusal.contains(words), "{options:?}: {refusal}");
    }
    for (options, words) in [
        (&["--network", "missing"][..], "network missing not found"),
        (&["--ip", "172.17.0.9"], "user specified IP address is supported on user defined networks only"),
        (&["--network", "taken", "--ip", "10.67.0.1"], "no configured subnet contains IP address"),
        (&["--network", "taken", "--ip", "10.66.0.1"], "Address already in use"),
        (&["--network-alias", "x"], "network-scoped aliases are only supported for user-defined networks"),
        (&["--network", "none", "--mac-address", "02:42:00:00:00:01"], "conflicting options: mac-address"),
        (&["--network", "container:nobody"], "No such container: nobody"),
        (&["--network", "host", "--sysctl", "net.core.somaxconn=9"], "not allowed in host network namespace"),
        (
            &["--network", "container:nobody", "--sysctl", "net.core.somaxconn=9"],
            "is not in a separate kernel namespace",
        ),
    ] {
        let refusal = daemon.fails(125, &[&["run", "--rm"], options, &["busybox", "true"]].concat());
        assert!(refusal.contains(words), "{options:?}: {refusal}");
    }
    up(&daemon, "one", &["--network", "taken", "--ip", "10.66.0.5"]);
    let refusal =
        daemon.fails(125, &["run", "--rm", "--network", "taken", "--ip", "10.66.0.5", "busybox", "true"]);
    assert!(refusal.contains("Address already in use"), "{refusal}");
    assert!(
        daemon
            .fails(1, &["network", "rm", "bridge"])
            .contains("is a pre-defined network and cannot be removed")
    );
    up(&daemon, "host", &["--network", "host"]);
    assert!(
        daemon
            .fails(1, &["network", "connect", "taken", "host"])
            .contains("cannot be connected to any other network")
    );
}

#[test]
fn the_way_out_is_that_of_the_networks_that_are_left() {
    let (_machine, daemon) = with_busybox();
    daemon.ok(&["network", "create", "--subnet", "10.71.0.0/24", "first"]);
    daemon.ok(&["network", "create", "--subnet", "10.72.0.0/24", "second"]);
    let way_out = || {
        let routes = daemon.ok(&["exec", "one", "busybox", "ip", "route"]);
        routes
            .lines()
            .filter(|line| line.starts_with("default "))
            .map(|line| format!("{line}\n"))
            .collect::<String>()
    };
    up(&daemon, "one", &["--network", "first"]);
    daemon.ok(&["network", "connect", "second", "one"]);
    assert!(way_out().contains("via 10.71.0.1 "), "{}", way_out());
    daemon.ok(&["network", "disconnect", "first", "one"]);
    assert!(way_out().contains("via 10.72.0.1 "), "{}", way_out());
    daemon.ok(&["network", "connect", "--gw-priority", "1", "first", "one"]);
    assert!(way_out().contains("via 10.71.0.1 ") && way_out().lines().count() == 1, "{}", way_out());
    daemon.ok(&["network", "disconnect", "first", "one"]);
    daemon.ok(&["network", "disconnect", "second", "one"]);
    assert_eq!(way_out(), "");
}

#[test]
fn a_network_that_is_given_by_its_id_is_the_same_one() {
    let (_machine, daemon) = with_busybox();
    let options = ["-o", "com.docker.network.bridge.host_binding_ipv4=127.0.0.1"];
    let id = daemon.ok(&[&["network", "create"][..], &options, &["mine"]].concat());
    up(&daemon, "one", &["--network", id.trim(), "-p", "80"]);
    assert_eq!(daemon.ok(&["inspect", "-f", "{{.HostConfig.NetworkMode}}", "one"]), "mine\n");
    let bindings = daemon.ok(&["port", "one"]);
    assert!(bindings.starts_with("80/tcp -> 127.0.0.1:") && bindings.lines().count() == 1, "{bindings}");
    let none = daemon.ok(&["network", "ls", "-q", "--no-trunc", "--filter", "name=none"]);
    up(&daemon, "alone", &["--network", none.trim(), "-p", "80"]);
    assert_eq!(daemon.ok(&["port", "alone"]), "");
}

#[test]
fn addresses_and_networks_survive_the_daemon_and_the_sandbox() {
    let machine = Machine::new();
    let daemon = Daemon::start(&machine);
    daemon.load_busybox();
    daemon.ok(&["network", "create", "--subnet", "10.77.0.0/24", "mine"]);
    up(&daemon, "one", &["--network", "mine"]);
    up(&daemon, "two", &["--network", "mine"]);
    daemon.ok(&["rm", "-f", "one"]);
    daemon.end();
    let daemon = Daemon::start(&machine);
    // The address of the one that is gone is free, that of the one that runs is not.
    up(&daemon, "three", &["--network", "mine"]);
    up(&daemon, "four", &["--network", "mine"]);
    assert_eq!(address(&daemon, "three", "mine"), "10.77.0.2");
    assert_eq!(address(&daemon, "two", "mine"), "10.77.0.3");
    assert_eq!(address(&daemon, "four", "mine"), "10.77.0.4");
    assert!(reaches(&daemon, "two", "10.77.0.4"));
    assert!(daemon.fails(1, &["network", "rm", "mine"]).contains("has active endpoints"));
    daemon.end();
    machine.kill_sandbox();
    let daemon = Daemon::start(&machine);
    for name in ["four", "two"] {
        daemon.ok(&["start", name]);
    }
    assert_eq!(address(&daemon, "two", "mine"), "10.77.0.3");
    assert_eq!(address(&daemon, "four", "mine"), "10.77.0.4");
    assert!(reaches(&daemon, "two", "10.77.0.4"));
    // To the end of the second in which they happened.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() + 1;
    let now = now.to_string();
    let format = "{{.Action}} {{.Actor.Attributes.name}}";
    let asked = ["events", "--since", "0", "--until", &now, "--filter", "type=network", "--format", format];
    let events = daemon.ok(&asked);
    assert!(events.contains("connect mine"), "{events}");
}
