//! Networks, names and published ports in the virtual machine. The clients are curl on the machine that runs it and busybox in
//! containers.

use std::{net::TcpStream, process::Command, thread, time::Duration};

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
