//! A container's files, whether or not it runs: through the agent of its sandbox, which is started if need be.

use std::sync::Arc;

use coracle_agent_api::{
    ProcessId,
    files::{FileChange, FilesOperation, FilesRequest},
};

use super::{Container, names::new_id, record::Record, spec};
use crate::{
    agent::{AgentError, FilesAnswer, FilesFrame, FilesInput},
    core::Core,
    error::{Error, Result},
    sandboxes::Host,
};

/// More changed paths than these are not listed: the list is kept whole.
const MAX_CHANGES: usize = 1_000_000;
const MAX_CHANGED_BYTES: usize = 256 * 1024 * 1024;

/// Work on files that has begun. The layers stay attached until it is dropped.
pub(crate) struct Work {
    pub(crate) answer: FilesAnswer,
    pub(crate) input: FilesInput,
    _layers: Layers,
}

/// Someone's use of attached layers.
struct Layers {
    core: Arc<Core>,
    host: Arc<Host>,
    user: ProcessId,
}

impl Drop for Layers {
    fn drop(&mut self) {
        let (host, user) = (Arc::clone(&self.host), self.user.clone());
        self.core.tasks.spawn(async move { host.release(&user).await });
    }
}

/// Begins work on a container's files.
pub(crate) async fn open(core: &Arc<Core>, container: &Container, operation: FilesOperation) -> Result<Work> {
    let record = container.record();
    let host = core.sandboxes.get(&record.sandbox);
    core.start_sandbox(&host).await?;
    // Not the container's own use, which ends with its run.
    let layers = Layers { core: Arc::clone(core), host: Arc::clone(&host), user: new_id() };
    let files = core.image_layers(&record.image()).await?;
    let on_a_path = matches!(
        operation,
        FilesOperation::Stat { .. } | FilesOperation::Read { .. } | FilesOperation::Write { .. }
    );
    let volumes = if on_a_path { core.volume_mounts(&record)? } else { Vec::new() };
    let request = FilesRequest { layers: host.attach(&layers.user, &files).await?, volumes, operation };
    let (answer, input) = host.agent().files(&record.id, &request).await?;
    Ok(Work { answer, input, _layers: layers })
}

/// Asks for what a container changed in its image as a layer: a tar stream in the data frames.
pub(crate) fn diff(record: &Record) -> FilesOperation {
    FilesOperation::Diff { injected: injected(record) }
}

fn injected(record: &Record) -> Vec<String> {
    spec::files(record, &[], &[])
        .map(|files| files.into_iter().map(|file| file.path).collect())
        .unwrap_or_default()
}

/// Which paths a container changed, sorted.
pub(crate) async fn changes(core: &Arc<Core>, container: &Container) -> Result<Vec<FileChange>> {
    let operation = FilesOperation::Changes { injected: injected(&container.record()) };
    let mut work = open(core, container, operation).await?;
    let (mut all, mut bytes) = (Vec::new(), 0);
    loop {
        match work.answer.next().await? {
            FilesFrame::Changes(changes) => {
                bytes += changes.iter().map(|change| change.path.len()).sum::<usize>();
                all.extend(changes);
            }
            FilesFrame::Done => return Ok(all),
            _ => return Err(unexpected()),
        }
        if all.len() > MAX_CHANGES || bytes > MAX_CHANGED_BYTES {
            return Err(Error::internal(format!(
                "the container changed more than {MAX_CHANGES} files, which are too many to list"
            )));
        }
    }
}

/// How many bytes a container's writable layer holds.
async fn size(core: &Arc<Core>, container: &Container) -> Result<u64> {
    let mut work = open(core, container, FilesOperation::Size).await?;
    match work.answer.next().await? {
        FilesFrame::Size(size) => Ok(size),
        _ => Err(unexpected()),
    }
}

/// A container's sizes as `inspect` and `ps` give them: of its writable layer, and of that and its image.
pub(crate) async fn sizes(core: &Arc<Core>, container: &Container) -> Result<(u64, u64)> {
    let written = size(core, container).await?;
    let image = container.record().image();
    let images = Arc::clone(&core.images);
    let image = tokio::task::spawn_blocking(move || images.image(&image)).await??;
    let layers: u64 = image.layers.iter().map(|layer| layer.size).sum();
    Ok((written, layers.saturating_add(written)))
}

/// The agent answers something else than was asked.
pub(crate) fn unexpected() -> Error {
    let reason = "a frame that was not asked for".to_owned();
    AgentError::Nonsense { path: "files".to_owned(), reason }.into()
}
