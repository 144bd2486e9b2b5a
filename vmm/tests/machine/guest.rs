//! The guest's side: dials the host when it is ready, then serves one command per connection. A connection begins with a
//! line of words; what follows depends on the command.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::thread;

const HOST: u32 = 2;
const ANY: u32 = u32::MAX;
pub(crate) const PORT: u32 = 1024;

pub(crate) fn main() -> ! {
    mount("proc", "/proc");
    mount("devtmpfs", "/dev");
    let listener = listen(PORT);
    let ready = thread::spawn(|| {
        let mut stream = dial(PORT);
        writeln!(stream, "ready").unwrap();
        // Ends when the host closes it.
        let _ = stream.read(&mut [0; 1]);
    });
    loop {
        let stream = accept(&listener);
        thread::spawn(move || {
            if let Err(error) = serve(stream) {
                eprintln!("guest: {error}");
            }
        });
        if ready.is_finished() {
            eprintln!("guest: the host closed the first connection");
        }
    }
}

pub(crate) fn serve(stream: File) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut out = stream;
    let words: Vec<&str> = line.split_whitespace().collect();
    let number = |index: usize| words[index].parse::<u64>().unwrap();
    match words[0] {
        "echo" => {
            std::io::copy(&mut reader, &mut out)?;
        }
        // Reads everything until the host ends its direction, and only then answers.
        "count" => {
            let (mut sum, mut total) = (0u64, 0u64);
            let mut buffer = vec![0; 65536];
            loop {
                let len = reader.read(&mut buffer)?;
                if len == 0 {
                    break;
                }
                total += len as u64;
                sum = buffer[..len].iter().fold(sum, |sum, byte| sum.wrapping_mul(31) + u64::from(*byte));
            }
            writeln!(out, "{total} {sum}")?;
        }
        // Reads everything, and answers how much it was.
        "sink" => {
            let mut buffer = vec![0; 256 * 1024];
            let mut total = 0;
            loop {
                match reader.read(&mut buffer)? {
                    0 => break,
                    len => total += len,
                }
            }
            writeln!(out, "{total}")?;
        }
        // Sends, ends its own direction, and goes on reading.
        "source" => {
            let mut left = number(1);
            let chunk: Vec<u8> = (0..65536u32).map(|i| (i % 251) as u8).collect();
            while left > 0 {
                let part = left.min(chunk.len() as u64) as usize;
                out.write_all(&chunk[..part])?;
                left -= part as u64;
            }
            shutdown_write(&out);
            let mut rest = Vec::new();
            reader.read_to_end(&mut rest)?;
            println!("guest: after its own end it read {} bytes", rest.len());
        }
        // Reads nothing for as long as the connection is there.
        "stall" => loop {
            thread::park();
        },
        "cpus" => writeln!(out, "{}", thread::available_parallelism()?)?,
        "memory" => writeln!(out, "{}", proc_value("/proc/meminfo", "MemTotal:"))?,
        "uptime" => write!(out, "{}", std::fs::read_to_string("/proc/uptime")?)?,
        "dial" => {
            let mut dialled = dial(number(1) as u32);
            std::io::copy(&mut reader, &mut dialled)?;
        }
        "read" => {
            let result =
                direct(words[1], false).and_then(|file| read_aligned(&file, number(2), number(3) as usize));
            match result {
                Ok(data) => {
                    writeln!(out, "ok")?;
                    out.write_all(&data)?;
                }
                Err(error) => writeln!(out, "{}", error.raw_os_error().unwrap_or(-1))?,
            }
        }
        "write" => {
            let mut data = Vec::new();
            reader.read_to_end(&mut data)?;
            let file = OpenOptions::new().write(true).open(words[1])?;
            file.write_all_at(&data, number(2))?;
            file.sync_all()?;
            writeln!(out, "ok")?;
        }
        "mount-files" => {
            let error = mount_at("coracle", "virtiofs", "/mnt").err();
            writeln!(out, "{}", error.and_then(|error| error.raw_os_error()).unwrap_or(0))?;
        }
        "get" => match std::fs::read(words[1]) {
            Ok(data) => {
                writeln!(out, "ok")?;
                out.write_all(&data)?;
            }
            Err(error) => writeln!(out, "{}", error.raw_os_error().unwrap_or(-1))?,
        },
        "put" => {
            let mut data = Vec::new();
            reader.read_to_end(&mut data)?;
            std::fs::write(words[1], &data)?;
            writeln!(out, "ok")?;
        }
        "disk" => writeln!(out, "{}", disk(&words[1..])?)?,
        "discard" => writeln!(out, "{}", discard(words[1], number(2), number(3)))?,
        "random" => {
            let mut data = [0; 32];
            File::open("/dev/hwrng")?.read_exact(&mut data)?;
            out.write_all(&data)?;
        }
        // Writes to so many MiB of memory, and frees them.
        "touch" => {
            let mut memory = vec![0u8; (number(1) as usize) << 20];
            memory.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
            drop(std::hint::black_box(memory));
            writeln!(out, "touched")?;
        }
        "nap" => {
            thread::sleep(std::time::Duration::from_millis(200));
            writeln!(out, "awake")?;
        }
        "spin" => loop {
            std::hint::spin_loop();
        },
        "reboot" => {
            // SAFETY: ends the machine; no memory is involved.
            unsafe { libc::reboot(libc::LINUX_REBOOT_CMD_RESTART) };
        }
        "panic" => std::process::abort(),
        other => writeln!(out, "unknown command {other}")?,
    }
    Ok(())
}

fn proc_value(path: &str, key: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap();
    let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default();
    line.split_whitespace().nth(1).unwrap_or_default().to_owned()
}

/// Opens a block device so that every read reaches the disk.
fn direct(path: &str, write: bool) -> std::io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    OpenOptions::new().read(true).write(write).custom_flags(libc::O_DIRECT).open(path)
}

fn read_aligned(file: &File, position: u64, len: usize) -> std::io::Result<Vec<u8>> {
    let mut buffer = vec![0; len + 4096];
    let begin = buffer.as_ptr().align_offset(4096);
    file.read_exact_at(&mut buffer[begin..begin + len], position)?;
    Ok(buffer[begin..begin + len].to_vec())
}

/// Uses the first disk past the guest's page cache; microseconds for all of it, or for one of many requests.
fn disk(words: &[&str]) -> std::io::Result<u128> {
    const ALL: u64 = 64 << 20;
    const LARGE: usize = 1 << 20;
    const SMALL: usize = 4096;
    const COUNT: u64 = 512;
    let begin = std::time::Instant::now();
    match words {
        ["read"] => {
            let file = direct("/dev/vda", false)?;
            for position in (0..ALL).step_by(LARGE) {
                read_aligned(&file, position, LARGE)?;
            }
            Ok(begin.elapsed().as_micros())
        }
        ["write"] => {
            let file = direct("/dev/vda", true)?;
            for position in (0..ALL).step_by(LARGE) {
                write_aligned(&file, position, LARGE)?;
            }
            Ok(begin.elapsed().as_micros())
        }
        ["random", threads] => {
            let threads: u64 = threads.parse().unwrap();
            let workers: Vec<_> = (0..threads)
                .map(|thread| {
                    thread::spawn(move || {
                        let file = direct("/dev/vda", false)?;
                        for number in 0..COUNT / threads {
                            let place = (thread + number * threads).wrapping_mul(2_654_435_761);
                            read_aligned(&file, place % (ALL / 4096) * 4096, SMALL)?;
                        }
                        Ok::<_, std::io::Error>(())
                    })
                })
                .collect();
            workers.into_iter().try_for_each(|worker| worker.join().unwrap())?;
            Ok(begin.elapsed().as_micros() / u128::from(COUNT))
        }
        ["flush"] => {
            let file = direct("/dev/vda", true)?;
            for number in 0..COUNT / 8 {
                write_aligned(&file, number * 8192, SMALL)?;
                file.sync_data()?;
            }
            Ok(begin.elapsed().as_micros() / u128::from(COUNT / 8))
        }
        other => panic!("{other:?} is nothing to do with a disk"),
    }
}

fn write_aligned(file: &File, position: u64, len: usize) -> std::io::Result<()> {
    let buffer = vec![7; len + 4096];
    let begin = buffer.as_ptr().align_offset(4096);
    file.write_all_at(&buffer[begin..begin + len], position)
}

fn discard(path: &str, position: u64, len: u64) -> i32 {
    const BLKDISCARD: libc::c_ulong = 0x1277;
    let file = OpenOptions::new().write(true).open(path).unwrap();
    let range = [position, len];
    // SAFETY: the request reads two numbers from `range`.
    unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, &range) }
}

fn mount(kind: &str, path: &str) {
    // What is missing shows in what fails for it.
    let _ = mount_at(kind, kind, path);
}

fn mount_at(source: &str, kind: &str, path: &str) -> std::io::Result<()> {
    let [source, kind, path] = [source, kind, path].map(|text| std::ffi::CString::new(text).unwrap());
    // SAFETY: the strings end with zero and outlive the call.
    let result = unsafe { libc::mount(source.as_ptr(), path.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

fn socket() -> File {
    // SAFETY: makes a new descriptor, which the file then owns.
    unsafe {
        let fd = libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
        assert!(fd >= 0, "vsock socket: {}", std::io::Error::last_os_error());
        File::from_raw_fd(fd)
    }
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: all zeroes is a valid address.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as u16;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn dial(port: u32) -> File {
    let socket = socket();
    let address = address(HOST, port);
    // SAFETY: the address outlives the call and has the given size.
    let result = unsafe {
        libc::connect(socket.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as u32)
    };
    assert_eq!(result, 0, "connect: {}", std::io::Error::last_os_error());
    socket
}

fn listen(port: u32) -> File {
    let socket = socket();
    let address = address(ANY, port);
    // SAFETY: as in `dial`.
    let result = unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as u32)
            | libc::listen(socket.as_raw_fd(), 4096)
    };
    assert_eq!(result, 0, "listen: {}", std::io::Error::last_os_error());
    socket
}

fn accept(listener: &File) -> File {
    // SAFETY: makes a new descriptor, which the file then owns; no address is asked for.
    unsafe {
        let fd = libc::accept4(
            listener.as_raw_fd(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            libc::SOCK_CLOEXEC,
        );
        assert!(fd >= 0, "accept: {}", std::io::Error::last_os_error());
        File::from_raw_fd(fd)
    }
}

fn shutdown_write(stream: &File) {
    // SAFETY: no memory is involved.
    unsafe { libc::shutdown(stream.as_raw_fd(), libc::SHUT_WR) };
}
