//! Frames of [`coracle_agent_api::egress`] on a connection to an agent, which the conversations on them share.

use std::io;

use coracle_agent_api::egress::{HEADER_LEN, Header};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::mpsc,
};

/// Reads one frame; its payload replaces what was in `payload`.
pub(crate) async fn next(reader: &mut (impl AsyncRead + Unpin), payload: &mut Vec<u8>) -> io::Result<Header> {
    let mut header = [0; HEADER_LEN];
    reader.read_exact(&mut header).await?;
    let header = Header::decode(&header).map_err(io::Error::other)?;
    payload.resize(header.len, 0);
    reader.read_exact(payload).await?;
    Ok(header)
}

/// Sends `frames` until there will be no more, and hears until the connection ends; the reason of its end.
pub(crate) async fn converse(
    mut writer: impl AsyncWrite + Unpin,
    mut frames: mpsc::Receiver<Vec<u8>>,
    hear: impl Future<Output = io::Result<()>>,
) -> String {
    let write = async {
        while let Some(frame) = frames.recv().await {
            writer.write_all(&frame).await?;
        }
        Ok(())
    };
    let ended: io::Result<()> = tokio::select! {
        ended = write => ended,
        ended = hear => ended,
    };
    ended.err().map_or_else(|| "the agent has ended it".to_owned(), |error| error.to_string())
}
