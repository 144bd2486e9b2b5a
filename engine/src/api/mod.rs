//! The endpoints, by area. Each takes a request apart, asks the engine, and puts Docker's JSON together.

pub(crate) mod attach;
pub(crate) mod containers;
pub(crate) mod create;
pub(crate) mod events;
pub(crate) mod exec;
pub(crate) mod images;
pub(crate) mod list;
pub(crate) mod load;
pub(crate) mod logs;
pub mod private;
pub(crate) mod prune;
pub(crate) mod system;
pub(crate) mod wait;

use std::sync::Arc;

use coracle_image_store::ImageStore;

use crate::{core::Core, error::Result};

/// Runs something of the image store's, which is synchronous, on a thread of its own.
pub(crate) async fn images<T, E>(
    core: &Core,
    work: impl FnOnce(&ImageStore) -> Result<T, E> + Send + 'static,
) -> Result<T>
where
    T: Send + 'static,
    E: Send + 'static,
    crate::error::Error: From<E>,
{
    let images = Arc::clone(&core.images);
    Ok(tokio::task::spawn_blocking(move || work(&images)).await??)
}

/// Does something to its end even if the client goes away meanwhile.
pub(crate) async fn to_its_end<T: Send + 'static>(
    core: &Core,
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    core.tasks.spawn(work).await?
}
