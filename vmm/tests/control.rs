//! A VMM process and clients that do not keep to the protocol: each gets an error that says what is wrong, and the VMM serves the next.
#![allow(unsafe_code)]

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command};

use coracle_vmm::control::{
    self, ExitReason, FromVmm, MAX_FDS, MAX_MESSAGE, MachineState, Outcome, Received,
};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

struct Vmm {
    child: Child,
    socket: PathBuf,
    _folder: tempfile::TempDir,
}

impl Vmm {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("control.sock");
        let listener = control::listen(&socket).unwrap();
        // Not 3 already: a copy onto itself would still be closed by the start of the program.
        let listener = rustix::io::fcntl_dupfd_cloexec(&listener, 10).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_coracle-vmm"));
        let fd = listener.as_raw_fd();
        // SAFETY: between fork and exec, only `dup2` is called, which may be.
        unsafe {
            command.pre_exec(move || match libc::dup2(fd, 3) {
                -1 => Err(std::io::Error::last_os_error()),
                _ => Ok(()),
            });
        }
        Self { child: command.spawn().unwrap(), socket, _folder: folder }
    }

    fn connect(&self) -> OwnedFd {
        control::connect(&self.socket).unwrap()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a record as it is, with descriptors.
fn send(socket: &OwnedFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); 1024];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
}

/// The next reply: its id, and the error if it is one.
fn reply(socket: &OwnedFd) -> (u64, Result<control::Answer, String>) {
    let Received::Message(bytes, _) = control::receive(socket).unwrap() else { panic!("the VMM hung up") };
    match serde_json::from_slice(&bytes).unwrap() {
        FromVmm::Reply(reply) => match reply.outcome {
            Outcome::Ok(answer) => (reply.id, Ok(answer)),
            Outcome::Error(message) => (reply.id, Err(message)),
        },
        FromVmm::Event(event) => panic!("{event:?}"),
    }
}

fn state(socket: &OwnedFd) -> MachineState {
    send(socket, br#"{"id":99,"request":"status"}"#, &[]);
    match reply(socket) {
        (99, Ok(control::Answer::Status(status))) => status.state,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_no_request_is_refused_by_what_is_wrong_with_it() {
    let vmm = Vmm::start();
    let client = vmm.connect();
    let file = tempfile::tempfile().unwrap();
    let fd = file.as_fd();
    let long = vec![b' '; MAX_MESSAGE + 1];
    let connect: &[u8] = br#"{"id":7,"request":{"vsock_connect":{"port":5}}}"#;
    let detach: &[u8] = br#"{"id":8,"request":{"detach_segment":{"offset":4096}}}"#;
    let cases: &[(&[u8], usize, u64, &str)] = &[
        (b"\xff\xfe", 0, 0, "cannot be read"),
        (b"{}", 0, 0, "missing field"),
        (br#"{"id":1,"request":"fly"}"#, 0, 0, "unknown variant `fly`"),
        (br#"{"id":-1,"request":"status"}"#, 0, 0, "invalid value"),
        (br#"{"id":1,"request":"status","more":1}"#, 0, 0, "unknown field `more`"),
        (br#"{"id":1,"request":{"vsock_listen":{"port":4294967296}}}"#, 0, 0, "invalid value"),
        (&long, 0, 0, "longer than"),
        (connect, 0, 7, "needs 1 descriptors and came with 0"),
        (connect, 2, 7, "needs 1 descriptors and came with 2"),
        (connect, MAX_FDS + 1, 0, "more than 8 descriptors"),
        (detach, 1, 8, "needs 0 descriptors and came with 1"),
        (detach, 0, 8, "has not been booted"),
        (connect, 1, 7, "has not been booted"),
        (
            br#"{"id":7,"request":{"vsock_connect":{"port":5,"from":1073741823}}}"#,
            1,
            7,
            "has not been booted",
        ),
        (
            br#"{"id":7,"request":{"vsock_connect":{"port":5,"from":1073741824}}}"#,
            1,
            7,
            "is not below 1073741824",
        ),
        (br#"{"id":9,"request":"pause"}"#, 0, 9, "has not been booted"),
        (br#"{"id":9,"request":"resume"}"#, 0, 9, "has not been booted"),
    ];
    for (bytes, fds, id, words) in cases {
        send(&client, bytes, &vec![fd; *fds]);
        let (found, outcome) = reply(&client);
        let message = outcome.unwrap_err();
        assert!(found == *id && message.contains(words), "{words}: {found} {message}");
        assert_eq!(state(&client), MachineState::Created);
    }
}

#[test]
fn a_client_that_hangs_up_in_the_middle_or_never_reads_costs_only_itself() {
    let mut vmm = Vmm::start();
    for _ in 0..50 {
        let client = vmm.connect();
        send(&client, br#"{"id":1,"request":"status"}"#, &[]);
        drop(client);
    }
    let deaf = vmm.connect();
    rustix::io::ioctl_fionbio(&deaf, true).unwrap();
    // Until it has been dropped for it.
    while rustix::net::send(&deaf, br#"{"id":1,"request":"status"}"#, SendFlags::NOSIGNAL).is_ok_and(|_| true)
    {
    }
    let client = vmm.connect();
    assert_eq!(state(&client), MachineState::Created);
    send(&client, br#"{"id":3,"request":"stop"}"#, &[]);
    assert_eq!(reply(&client), (3, Ok(control::Answer::Done)));
    let Received::Message(bytes, _) = control::receive(&client).unwrap() else { panic!("no farewell") };
    let FromVmm::Event(control::Event::Exited { reason }) = serde_json::from_slice(&bytes).unwrap() else {
        panic!("no farewell")
    };
    assert_eq!(reason, ExitReason::Stopped);
    assert!(vmm.child.wait().unwrap().success());
}

#[test]
fn without_its_control_socket_the_vmm_says_what_it_needs() {
    let output = Command::new(env!("CARGO_BIN_EXE_coracle-vmm")).output().unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("started by the daemon, not by hand"), "{text}");
}
