//! What is measured over a connection, whatever it runs over: a machine's guest or a thread of this process serves it.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::{guest, process};

/// Makes a connection to a server of [`guest`]'s commands.
pub(crate) type Connect<'a> = &'a dyn Fn() -> File;

/// The guest's commands, served over loopback TCP by threads of this process.
pub(crate) struct TcpServer {
    address: std::net::SocketAddr,
}

impl TcpServer {
    pub(crate) fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || {
                    // As the guest does.
                    let _ = stream.set_nodelay(true);
                    if let Err(error) = guest::serve(File::from(OwnedFd::from(stream))) {
                        eprintln!("the TCP server: {error}");
                    }
                });
            }
        });
        Ok(Self { address })
    }

    pub(crate) fn connect(&self) -> File {
        let stream = TcpStream::connect(self.address).expect("the server listens");
        stream.set_nodelay(true).expect("a TCP socket");
        File::from(OwnedFd::from(stream))
    }
}

fn milliseconds(begin: Instant) -> f64 {
    begin.elapsed().as_secs_f64() * 1e3
}

/// A connection on which this command was given.
fn command(connect: Connect<'_>, line: &str) -> Result<File> {
    let mut connection = connect();
    connection.write_all(format!("{line}\n").as_bytes())?;
    Ok(connection)
}

fn end_writing(connection: &File) -> Result<()> {
    Ok(rustix::net::shutdown(connection, rustix::net::Shutdown::Write)?)
}

/// Sends so many bytes over so many streams at a time; milliseconds until the other side has read all of them.
pub(crate) fn to_guest(connect: Connect<'_>, streams: usize, bytes: usize) -> Result<f64> {
    let connections = (0..streams).map(|_| command(connect, "sink")).collect::<Result<Vec<_>>>()?;
    let each = bytes / streams;
    let begin = Instant::now();
    in_parallel(connections, |mut connection| {
        let chunk = vec![7; 256 * 1024];
        let mut left = each;
        while left > 0 {
            let part = left.min(chunk.len());
            connection.write_all(&chunk[..part])?;
            left -= part;
        }
        end_writing(&connection)?;
        let mut answer = String::new();
        connection.read_to_string(&mut answer)?;
        ensure!(answer.trim() == each.to_string(), "{answer} of {each} bytes arrived");
        Ok(())
    })?;
    Ok(milliseconds(begin))
}

/// The other way round.
pub(crate) fn to_host(connect: Connect<'_>, streams: usize, bytes: usize) -> Result<f64> {
    let connections = (0..streams).map(|_| Ok(connect())).collect::<Result<Vec<_>>>()?;
    let each = bytes / streams;
    let begin = Instant::now();
    in_parallel(connections, |mut connection| {
        connection.write_all(format!("source {each}\n").as_bytes())?;
        let mut buffer = vec![0; 256 * 1024];
        let mut found = 0;
        loop {
            match connection.read(&mut buffer)? {
                0 => break,
                len => found += len,
            }
        }
        ensure!(found == each, "{found} of {each} bytes arrived");
        Ok(())
    })?;
    Ok(milliseconds(begin))
}

fn in_parallel(connections: Vec<File>, work: impl Fn(File) -> Result<()> + Sync) -> Result<()> {
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            connections.into_iter().map(|connection| scope.spawn(|| work(connection))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("the thread returns its errors"))
    })
}

/// Microseconds for a byte to come back, in the middle of so many trips.
pub(crate) fn trips(connect: Connect<'_>, count: usize) -> Result<f64> {
    let mut connection = command(connect, "echo")?;
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let begin = Instant::now();
        connection.write_all(b"x")?;
        connection.read_exact(&mut [0])?;
        times.push(milliseconds(begin) * 1e3);
    }
    Ok(coracle_tests::report::median(&times))
}

/// Microseconds for a connection, a question and its answer, in the middle of so many.
pub(crate) fn connects(connect: Connect<'_>, count: usize) -> Result<f64> {
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let begin = Instant::now();
        let mut answer = String::new();
        command(connect, "sink").and_then(|mut connection| {
            end_writing(&connection)?;
            Ok(connection.read_to_string(&mut answer)?)
        })?;
        ensure!(answer.trim() == "0", "the answer was {answer}");
        times.push(milliseconds(begin) * 1e3);
    }
    Ok(coracle_tests::report::median(&times))
}

/// A command whose answer is a number.
pub(crate) fn ask_number(connect: Connect<'_>, line: &str) -> Result<f64> {
    let mut answer = String::new();
    command(connect, line)?.read_to_string(&mut answer)?;
    answer.trim().parse().with_context(|| format!("`{line}` was answered with `{}`", answer.trim()))
}

/// What share of three quarters of a guest's memory is still held 10 s after the guest wrote to them and freed them, in percent.
pub(crate) fn memory_back(connect: Connect<'_>, pid: u32, guest_mib: u64) -> Result<f64> {
    let touched = guest_mib * 3 / 4;
    let before = process::guest_memory(pid, guest_mib)?;
    let mut answer = String::new();
    command(connect, &format!("touch {touched}"))?.read_to_string(&mut answer)?;
    ensure!(answer.trim() == "touched", "the guest said {answer}");
    std::thread::sleep(Duration::from_secs(10));
    let held = process::guest_memory(pid, guest_mib)? - before;
    // Exactly nothing would make no ratio.
    Ok((100.0 * held / touched as f64).max(0.1))
}
