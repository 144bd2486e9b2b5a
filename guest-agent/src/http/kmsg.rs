//! The kernel's log as text, from its beginning and then as it grows.

use std::convert::Infallible;
use std::fmt::Write;
use std::io;
use std::os::fd::OwnedFd;

use bytes::Bytes;
use coracle_agent_api::ErrorKind;
use futures_util::stream;
use http::{HeaderValue, Response, header};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use rustix::fs::{Mode, OFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::Body;
use crate::error::{AtStep, Result};
use crate::sys;

/// The kernel's longest record.
const MAX_RECORD: usize = 8192;

/// Answers with the log: what is there now or, if it is to be followed, also what comes.
pub(super) fn read(follow: bool) -> Result<Response<Body>> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let kmsg =
        rustix::fs::open("/dev/kmsg", flags, Mode::empty()).at_kind(ErrorKind::Internal, "open /dev/kmsg")?;
    let kmsg = sys::watch(kmsg).at_kind(ErrorKind::Internal, "watch /dev/kmsg")?;
    let lines = stream::unfold(kmsg, move |kmsg| async move {
        let lines = next_lines(&kmsg, follow).await?;
        Some((Ok::<_, Infallible>(Frame::data(lines)), kmsg))
    });
    let mut response = Response::new(StreamBody::new(lines).boxed_unsync());
    let text = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, text);
    Ok(response)
}

async fn next_lines(kmsg: &AsyncFd<OwnedFd>, follow: bool) -> Option<Bytes> {
    let mut record = [0; MAX_RECORD];
    loop {
        let mut read = |fd: &OwnedFd| rustix::io::read(fd, &mut record).map_err(io::Error::from);
        let read = match follow {
            true => {
                let read = |fd: &OwnedFd| rustix::io::read(fd, &mut record).map_err(io::Error::from);
                kmsg.async_io(Interest::READABLE, read).await
            }
            false => read(kmsg.get_ref()),
        };
        match read {
            Ok(len) => {
                let lines = format_record(&String::from_utf8_lossy(&record[..len]));
                if !lines.is_empty() {
                    return Some(lines.into());
                }
            }
            // The record was overwritten before it was read; the next read goes on behind the gap.
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
            Err(_) => return None,
        }
    }
}

/// `priority,sequence,microseconds,flags;text`, as `dmesg` prints it; continuation lines are left out.
fn format_record(record: &str) -> String {
    let mut formatted = String::new();
    let Some((head, text)) = record.split_once(';') else { return formatted };
    let micros: u64 = head.split(',').nth(2).and_then(|micros| micros.parse().ok()).unwrap_or(0);
    let (seconds, micros) = (micros / 1_000_000, micros % 1_000_000);
    for line in text.lines().filter(|line| !line.starts_with(' ')) {
        let _ = writeln!(formatted, "[{seconds:5}.{micros:06}] {line}");
    }
    formatted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_looks_as_dmesg_prints_it() {
        let record = "6,339,5140900,-;NET: Registered protocol\n SUBSYSTEM=net\n";
        assert_eq!(format_record(record), "[    5.140900] NET: Registered protocol\n");
        assert_eq!(format_record("garbage"), "");
    }
}
