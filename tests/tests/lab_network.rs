//! Networks, names and published ports in the virtual machine. The clients are curl on the machine that runs it and busybox in
//! containers.

use std::{
    net::{TcpStream, UdpSocket},
    process::Command,
    thread,
    time::Duration,
};

use coracle_tests::Installation;

/// What curl gets, if it gets anything.
fn get(url: &str) -> Option<String> {
    let output =
        Command::new("curl").args(["--silent", "--max-time", "60", "--noproxy", "*", url]).output().unwrap();
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Waits until something is so; the lab is slow.
fn soon(what: &str, mut so: impl FnMut() -> bool) {
    for _ in 0..600 {
        if so() {
            return;
        }
        thread::sleep(Duration::from_millis(100));
    }
    panic!("never: {what}");
}

#[test]
fn containers_find_each_other_and_are_found_from_the_host() {
    let coracle = Installation::new().with_busybox();
    let docker = |args: &[&str]| coracle.docker(args);
    docker(&["network", "create", "mine"]).ok();
    docker(&["run", "-d", "--name", "db", "--network", "mine", "busybox", "sleep", "1000"]).ok();
    let ping =
        ["run", "--rm", "--network", "mine", "busybox", "busybox", "ping", "-c", "1", "-W", "10", "db"];
    docker(&ping).ok();
    docker(&["run", "--rm", "busybox", "busybox", "ping", "-c", "1", "-W", "2", "db"]).code(1);

    docker(&["run", "-d", "--name", "web", "-p", "127.0.0.1:18080:80", "busybox", "sleep", "1000"]).ok();
    let refused = || {
        TcpStream::connect("127.0.0.1:18080")
            .is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
    };
    assert!(refused(), "nothing listens in the container yet");
    let serve =
        "mkdir -p /www; echo ahoy > /www/index.html; echo $$ > /pid; exec busybox httpd -f -p 80 -h /www";
    docker(&["exec", "-d", "web", "sh", "-c", serve]).ok();
    soon("the page is served", || get("http://127.0.0.1:18080/").as_deref() == Some("ahoy\n"));
    docker(&["exec", "web", "sh", "-c", "kill $(cat /pid)"]).ok();
    soon("it is refused again", refused);
    docker(&["rm", "-f", "web", "db"]).ok();
    docker(&["network", "rm", "mine"]).ok();
}

/// A server of datagrams: each is answered with its sender's address and what it holds.
const SERVER: &str = r#"
#include <arpa/inet.h>
#include <stdio.h>
#include <sys/socket.h>
int main(void) {
  int s = socket(AF_INET, SOCK_DGRAM, 0);
  struct sockaddr_in own = {.sin_family = AF_INET, .sin_port = htons(53)}, from;
  if (bind(s, (void *)&own, sizeof own)) return 1;
  for (;;) {
    char said[1000], answer[1100];
    socklen_t len = sizeof from;
    int n = recvfrom(s, said, sizeof said, 0, (void *)&from, &len);
    int m = snprintf(answer, sizeof answer, "%s %.*s", inet_ntoa(from.sin_addr), n, said);
    sendto(s, answer, m, 0, (void *)&from, len);
  }
}
"#;

#[test]
fn datagrams_come_in_and_are_answered_and_the_guests_network_has_names() {
    let coracle = Installation::new().with_busybox();
    let docker = |args: &[&str]| coracle.docker(args);
    let folder = tempfile::tempdir().unwrap();
    let (source, program) = (folder.path().join("server.c"), folder.path().join("server"));
    std::fs::write(&source, SERVER).unwrap();
    let built = Command::new("cc").args(["-static", "-O1", "-o"]).args([&program, &source]).status();
    assert!(built.expect("a C compiler (package gcc) is there").success());
    let publish = ["-p", "127.0.0.1:15353:53/udp", "-p", "127.0.0.1:15353:53/tcp"];
    docker(&[&["run", "-d", "--name", "echo"][..], &publish, &["busybox", "sleep", "1000"]].concat()).ok();
    docker(&["cp", program.to_str().unwrap(), "echo:/server"]).ok();
    docker(&["exec", "-d", "echo", "/server"]).ok();
    let clients: Vec<UdpSocket> = (0..20).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
    for (number, client) in clients.iter().enumerate() {
        client.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let (said, mut answer) = (format!("ahoy {number}"), [0; 100]);
        soon("there is an answer", || {
            client.send_to(said.as_bytes(), "127.0.0.1:15353").unwrap();
            let Ok((len, from)) = client.recv_from(&mut answer) else { return false };
            assert_eq!(from, "127.0.0.1:15353".parse().unwrap());
            answer[..len] == *format!("172.17.0.1 {said}").as_bytes()
        });
    }
    docker(&["rm", "-f", "echo"]).ok();

    // Each of those with the guest's network has names of its own, under the guest's kernel too.
    let lookup = "busybox nslookup host.docker.internal 127.0.0.11";
    let silent = ["run", "-d", "--name", "silent", "--network", "host", "--label", "coracle.egress=none"];
    docker(&[&silent[..], &["busybox", "sleep", "1000"]].concat()).ok();
    docker(&["exec", "silent", "sh", "-c", lookup]).code(1);
    let free = docker(&["run", "--rm", "--network", "host", "busybox", "sh", "-c", lookup]);
    assert!(free.out().contains("192.168.65.254"), "{free:?}");
    // No container changes its own limits, whatever it may do otherwise.
    let own = "cat /sys/fs/cgroup/memory.max && echo 1000000000 > /sys/fs/cgroup/memory.max";
    let limited = docker(&["run", "--rm", "--privileged", "-m", "64m", "busybox", "sh", "-c", own]);
    assert!(limited.out().starts_with("67108864\n"), "{limited:?}");
    docker(&["run", "--rm", "--privileged", "-m", "64m", "busybox", "sh", "-c", own]).code(1);
    docker(&["rm", "-f", "silent"]).ok();
}
