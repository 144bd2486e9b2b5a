//! A process's streams over an upgraded connection.

use std::sync::Arc;

use coracle_agent_api::frame::{ACK_LEN, Ack};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::processes::Process;
use crate::processes::spool::Next;

/// Sends frames and takes acknowledgements until the end was delivered, the client goes, or another one comes.
pub(super) async fn output(process: Arc<Process>, after: u64, io: impl AsyncRead + AsyncWrite + Send) {
    let (mut reader, mut writer) = tokio::io::split(io);
    let subscription = process.spool.subscribe();
    let acknowledgements = async {
        let mut bytes = [0; ACK_LEN];
        while reader.read_exact(&mut bytes).await.is_ok() {
            process.spool.acknowledge(Ack::decode(bytes).0);
        }
    };
    let frames = async {
        let mut after = after;
        loop {
            match process.spool.next(subscription, after).await {
                Next::Frames(bytes, last) => {
                    if writer.write_all(&bytes).await.is_err() || writer.flush().await.is_err() {
                        return false;
                    }
                    after = last;
                }
                Next::Ended => return writer.shutdown().await.is_ok(),
                Next::Replaced => return false,
            }
        }
    };
    tokio::pin!(acknowledgements);
    tokio::select! {
        () = &mut acknowledgements => {}
        // The last acknowledgements may still be on their way.
        ended = frames => if ended { acknowledgements.await },
    }
}

/// Feeds the process's standard input; the connection is closed when the process reads no more.
pub(super) async fn stdin(process: Arc<Process>, mut io: impl AsyncRead + AsyncWrite + Send + Unpin) {
    if let Some(stdin) = &process.stdin {
        stdin.feed(&mut io).await;
    }
    let _ = io.shutdown().await;
}
