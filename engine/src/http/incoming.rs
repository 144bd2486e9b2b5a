//! A request's body, of which what a handler leaves unread comes back: most clients hear no answer while they still send.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::{Body, Frame, Incoming, SizeHint};

/// What is read of a body that no one wants, in bytes: as with Go's server, one that has more to send is cut off.
const MAX_SKIPPED: usize = 256 * 1024;

/// The body.
pub(crate) struct RequestBody {
    incoming: Option<Incoming>,
    rest: Arc<Mutex<Option<Incoming>>>,
}

/// Where a body goes that was dropped before its end.
pub(super) struct Rest(Arc<Mutex<Option<Incoming>>>);

impl RequestBody {
    pub(super) fn new(incoming: Incoming) -> (Self, Rest) {
        let rest = Arc::default();
        (Self { incoming: Some(incoming), rest: Arc::clone(&rest) }, Rest(rest))
    }
}

impl Rest {
    /// Before a refusal: reads what the client still sends, if it is not too much.
    pub(super) async fn skip(self) {
        let rest = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(rest) = rest {
            let _ = Limited::new(rest, MAX_SKIPPED).collect().await;
        }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match &mut self.incoming {
            Some(incoming) => Pin::new(incoming).poll_frame(context),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        if let Some(incoming) = self.incoming.take().filter(|incoming| !incoming.is_end_stream()) {
            *self.rest.lock().unwrap_or_else(PoisonError::into_inner) = Some(incoming);
        }
    }
}
