//! What containers in the virtual machine reach outside of it: servers of the test, on the loopback of the machine that runs
//! the virtual machine. The clients are busybox's.

use std::{
    io::{Read, Write},
    net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::mpsc::{Receiver, channel},
    thread,
};

use coracle_tests::Installation;

const HOST: &str = "192.168.65.254";
const HOST_V6: &str = "[fdc4:f303:9324::254]";
const LENGTH: usize = 8 << 20;

/// A server on the loopback; its port.
fn serve(ip: impl Into<std::net::IpAddr>, handle: impl Fn(TcpStream) + Send + Sync + 'static) -> u16 {
    let listener = TcpListener::bind(SocketAddr::new(ip.into(), 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let handle = std::sync::Arc::new(handle);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, handle) = (stream.unwrap(), handle.clone());
            thread::spawn(move || handle(stream));
        }
    });
    port
}

fn bytes() -> Vec<u8> {
    (0..LENGTH).map(|n| ((n as u32).wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// Answers an HTTP request with [`bytes`].
fn answer(mut stream: TcpStream) {
    let mut head = [0; 4096];
    let _ = stream.read(&mut head).unwrap();
    write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {LENGTH}\r\n\r\n").unwrap();
    stream.write_all(&bytes()).unwrap();
}

/// The sum of [`bytes`] as md5sum prints it.
fn sum() -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes()).unwrap();
    let output = std::process::Command::new("md5sum").arg(file.path()).output().unwrap();
    String::from_utf8(output.stdout[..32].to_vec()).unwrap()
}

#[test]
fn containers_reach_the_host_and_see_what_becomes_of_it() {
    let coracle = Installation::new().with_busybox();
    let inside = |script: &str| coracle.docker(&["run", "--rm", "busybox", "sh", "-c", script]);

    // Down, over both families of addresses.
    let (v4, v6) = (serve([127, 0, 0, 1], answer), serve(Ipv6Addr::LOCALHOST, answer));
    for url in [format!("http://{HOST}:{v4}/"), format!("http://{HOST_V6}:{v6}/")] {
        let fetched = inside(&format!("busybox wget -q -O - '{url}' | busybox md5sum")).text();
        assert_eq!(&fetched[..32], sum(), "{url}");
    }
    // Up; the server answers when it has seen the end.
    let count = serve([127, 0, 0, 1], |mut stream| {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        writeln!(stream, "{}", all.len()).unwrap();
    });
    let sent = inside(&format!("busybox dd if=/dev/zero bs=1024k count=8 | busybox nc {HOST} {count}"));
    assert_eq!(sent.text(), LENGTH.to_string());
    // Refused is refused.
    let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    inside(&format!("busybox wget -q -O - http://{HOST}:{unused}/")).code(1).says("refused");
    // What must not be reached is not.
    inside("busybox wget -q -O - http://169.254.169.254/").code(1).says("oute to host");
    // A reset is a reset.
    let reset = serve([127, 0, 0, 1], |mut stream| {
        stream.read_exact(&mut [0]).unwrap();
        rustix::net::sockopt::set_socket_linger(&stream, Some(std::time::Duration::ZERO)).unwrap();
    });
    inside(&format!("busybox wget -q -O - http://{HOST}:{reset}/")).code(1).says("reset by peer");
}

/// Answers the first question that comes with an address.
fn name_server(ip: &str) -> Receiver<()> {
    let socket = UdpSocket::bind((ip, 53)).unwrap();
    let (told, asked) = channel();
    thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((len, from)) = socket.recv_from(&mut buffer) {
            let mut answer = buffer[..len].to_vec();
            answer[2] |= 0x80;
            // One answer of type A, unless another type is asked for.
            if answer[len - 4..len - 2] == [0, 1] {
                answer[7] = 1;
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 10, 9, 8, 7]);
            }
            socket.send_to(&answer, from).unwrap();
            let _ = told.send(());
        }
    });
    asked
}

#[test]
fn datagrams_go_out_and_come_back() {
    let coracle = Installation::new().with_busybox();
    let asked = name_server("127.0.0.1");
    let looked_up = coracle.docker(&["run", "--rm", "busybox", "busybox", "nslookup", "ship.example", HOST]);
    assert!(looked_up.out().contains("10.9.8.7"), "{looked_up:?}");
    asked.recv().unwrap();
}

#[test]
fn a_download_outlives_the_daemon() {
    let coracle = Installation::new().with_busybox();
    let (go_on, waiting) = channel::<()>();
    let waiting = std::sync::Mutex::new(waiting);
    let port = serve([127, 0, 0, 1], move |mut stream| {
        stream.write_all(b"first\n").unwrap();
        waiting.lock().unwrap().recv().unwrap();
        stream.write_all(b"second\n").unwrap();
    });
    let port = port.to_string();
    coracle.docker(&["run", "-d", "--name", "reader", "busybox", "busybox", "nc", HOST, &port]).ok();
    let mut logs = coracle.command("docker");
    let mut logs = logs.args(["logs", "-f", "reader"]).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut first = [0; 6];
    logs.stdout.take().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(&first, b"first\n");
    coracle.kill(coracle.daemon_pid());
    logs.wait().unwrap();
    go_on.send(()).unwrap();
    coracle.coracle(&["up"]).ok();
    assert_eq!(coracle.docker(&["wait", "reader"]).text(), "0");
    assert_eq!(coracle.docker(&["logs", "reader"]).text(), "first\nsecond");
    coracle.docker(&["rm", "reader"]).ok();
}
