//! The virtio-fs device's back end: speaks vhost-user with the VMM's front end, and serves the rings in guest memory.
//!
//! The front end is the VMM, which is confined but may have fallen to its guest: what it sends is checked as any other input. The guest's
//! rings and messages are hostile. Guest memory is only accessed through `vm-memory`.

mod frontend;
mod ledger;
mod requests;
mod ring;

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use coracle_worker::limit::warn_limited;
use fuse_backend_rs::api::server::Server;
use vhost::vhost_user::{BackendReqHandler, Error};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::fs::Exported;
use frontend::Frontend;
use requests::Requests;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use ring::Ring;

/// Guest memory, which the front end may replace.
pub(crate) type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// The most rings: one for urgent requests (forgetting) and eight for the others.
pub const MAX_QUEUES: u64 = 9;
/// The most entries of a ring.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// Serves a machine's front end until it closes the connection.
///
/// # Errors
/// If the front end breaks the protocol, or a thread or event cannot be made.
pub fn serve(files: Arc<Exported>, frontend: UnixStream) -> io::Result<()> {
    let requests = Arc::new(Requests::start(Server::new(files))?);
    let handler = Arc::new(Mutex::new(Frontend::new(requests)));
    let mut connection = BackendReqHandler::from_stream(frontend, handler);
    loop {
        match connection.handle_request() {
            Ok(()) => {}
            Err(Error::Disconnected | Error::PartialMessage | Error::SocketBroken(_)) => return Ok(()),
            // The front end was told in its reply; it decides what to do.
            Err(error @ (Error::ReqHandlerError(_) | Error::InvalidParam | Error::InvalidOperation(_))) => {
                warn_limited!(%error, "a request of the VMM failed");
            }
            Err(error) => return Err(io::Error::other(error)),
        }
    }
}

/// The requests of a guest that a fuzzer plays.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn requests_for(server: Server<Arc<Exported>>) -> io::Result<Arc<Requests>> {
    Requests::start(server).map(Arc::new)
}
