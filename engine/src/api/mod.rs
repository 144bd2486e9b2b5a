//! The endpoints, by area. Each takes a request apart, asks the engine, and puts Docker's JSON together.

pub(crate) mod archive;
pub(crate) mod attach;
pub(crate) mod containers;
pub(crate) mod create;
pub(crate) mod events;
pub(crate) mod exec;
pub(crate) mod images;
pub(crate) mod list;
pub(crate) mod load;
pub(crate) mod logs;
pub(crate) mod networks;
pub mod private;
pub(crate) mod prune;
pub(crate) mod pull;
pub(crate) mod push;
pub(crate) mod registry;
pub(crate) mod stats;
pub(crate) mod system;
pub(crate) mod top;
mod transfer;
pub(crate) mod update;
pub(crate) mod volumes;
pub(crate) mod wait;

use std::sync::Arc;

use coracle_image_store::ImageStore;

use crate::{
    core::Core,
    error::{Error, Kind, Result},
    http::Request,
};

/// Runs something of the image store's, which is synchronous, on a thread of its own.
pub(crate) async fn images<T, E>(
    core: &Core,
    work: impl FnOnce(&ImageStore) -> Result<T, E> + Send + 'static,
) -> Result<T>
where
    T: Send + 'static,
    E: Send + 'static,
    Error: From<E>,
{
    let images = Arc::clone(&core.images);
    Ok(tokio::task::spawn_blocking(move || work(&images)).await??)
}

/// Does something to its end even if the client goes away meanwhile; only the end of the daemon cuts it short.
pub(crate) async fn to_its_end<T: Send + 'static>(
    core: &Core,
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    let done = core.tasks.spawn(core.closing.clone().run_until_cancelled_owned(work)).await?;
    done.ok_or_else(|| Error::new(Kind::Unavailable, "the daemon is ending"))?
}

/// Refuses a parameter of a query that asks for what is not there yet; its name in Docker's CLI is for people.
pub(crate) fn refuse(request: &Request, parameter: &str, option: &str) -> Result<()> {
    let asked = request.query.get(parameter).is_some() && request.query.flag(parameter);
    if asked {
        Err(Error::unsupported(format!("{option} is not supported by Coracle yet: leave it out")))
    } else {
        Ok(())
    }
}
