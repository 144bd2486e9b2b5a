//! Work on a container's files: helpers that the fork server makes, one for each request, and the rule that the writable layer
//! of a container is mounted once at a time. The agent only carries the bytes.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use coracle_agent_api::files::{FilesOperation, FilesRequest};
use coracle_agent_api::{ErrorKind, Layer, ProcessId, VolumeMount};
use rustix::mount::{UnmountFlags, unmount};
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::{Notify, watch};

use super::{Agent, blocking};
use crate::cgroup::Cgroup;
use crate::child::{FilesPlace, FilesTask, RootDir, mount_volumes, open_directory};
use crate::error::{AtStep, Result, conflict, invalid};
use crate::fork_server::{OrderRef, TaskFds};
use crate::layers::{self, LayerUse};
use crate::processes::{self, watch_fd};
use crate::{check, mounts, packet, sys};

/// How long a container's start or end waits for those who still copy; then they are cut off.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
const BLOCK: usize = 64 * 1024;

/// The helpers that are at work.
pub(super) struct Helpers {
    cgroup: Cgroup,
    inner: Mutex<Inner>,
    /// Told whenever one has ended and nothing of it is left.
    ended: Notify,
}

#[derive(Default)]
struct Inner {
    /// By container: what cuts each helper off.
    at_work: HashMap<ProcessId, Vec<Arc<watch::Sender<bool>>>>,
    /// Mounts of stopped containers, which helpers share.
    mounted: HashMap<ProcessId, Weak<Stopped>>,
}

/// A stopped container's root while someone looks at it. The order matters: the layers are in use until it is unmounted.
struct Stopped {
    root: OwnedFd,
    _attached: Option<Attached>,
    _layers: LayerUse,
}

/// Where a root with volumes in it is mounted: the kernel (before 6.15) mounts nothing in what is mounted nowhere itself.
struct Attached(PathBuf);

impl Drop for Attached {
    fn drop(&mut self) {
        let unmounted = unmount(&self.0, UnmountFlags::DETACH).map_err(std::io::Error::from);
        if let Err(error) = unmounted.and_then(|()| std::fs::remove_dir(&self.0)) {
            tracing::error!("unmounting a stopped container's files failed: {error}");
        }
    }
}

/// What a helper works on.
enum Ground {
    Running(Arc<AsyncFd<OwnedFd>>),
    Stopped(Arc<Stopped>),
    Upper { layer: OwnedFd, _below: LayerUse },
}

/// A helper that was started, and is ended in any case.
pub(crate) struct Session(Option<Work>);

struct Work {
    agent: Arc<Agent>,
    id: ProcessId,
    pid: u32,
    pidfd: AsyncFd<OwnedFd>,
    input: Option<pipe::Sender>,
    output: pipe::Receiver,
    ground: Ground,
    cut_off: Arc<watch::Sender<bool>>,
    writes: bool,
}

impl Helpers {
    pub(super) fn new(cgroup: Cgroup) -> Self {
        Self { cgroup, inner: Mutex::default(), ended: Notify::new() }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_idle(&self, id: &ProcessId) -> bool {
        !self.inner().at_work.contains_key(id)
    }

    /// Waits until no one works on a container's files; cuts those off that take longer than this.
    pub(super) async fn settle(&self, id: &ProcessId, patience: Duration) {
        let idle = async {
            loop {
                let ended = self.ended.notified();
                tokio::pin!(ended);
                ended.as_mut().enable();
                if self.is_idle(id) {
                    return;
                }
                ended.await;
            }
        };
        tokio::pin!(idle);
        if tokio::time::timeout(patience, idle.as_mut()).await.is_err() {
            for helper in self.inner().at_work.get(id).into_iter().flatten() {
                helper.send_replace(true);
            }
            idle.await;
        }
    }

    /// Cuts everyone off.
    pub(super) fn kill_all(&self) {
        for helper in self.inner().at_work.values().flatten() {
            helper.send_replace(true);
        }
    }

    fn begin(&self, id: &ProcessId) -> Arc<watch::Sender<bool>> {
        let cut_off = Arc::new(watch::Sender::new(false));
        self.inner().at_work.entry(id.clone()).or_default().push(cut_off.clone());
        cut_off
    }

    fn end(&self, id: &ProcessId, cut_off: &Arc<watch::Sender<bool>>) {
        let mut inner = self.inner();
        if let Some(helpers) = inner.at_work.get_mut(id) {
            helpers.retain(|helper| !Arc::ptr_eq(helper, cut_off));
            if helpers.is_empty() {
                inner.at_work.remove(id);
                inner.mounted.remove(id);
            }
        }
        drop(inner);
        self.ended.notify_waiters();
    }
}

impl Agent {
    /// Starts a helper for a request.
    pub(crate) async fn work_on_files(
        self: &Arc<Self>,
        id: ProcessId,
        request: FilesRequest,
    ) -> Result<Session> {
        check(&request)?;
        let running = self.containers.settled(&id).await;
        if running.is_none() && self.processes.is_active(&id) {
            return Err(conflict(format!("container {} is being removed", id.short())));
        }
        // From here on a start waits.
        let cut_off = self.files.begin(&id);
        let begun = self.begin_work(&id, request, running.map(|container| container.pidfd.clone())).await;
        match begun {
            Ok((ground, helper)) => Ok(Session(Some(Work {
                agent: self.clone(),
                id,
                pid: helper.pid,
                pidfd: helper.pidfd,
                input: Some(helper.input),
                output: helper.output,
                ground,
                cut_off,
                writes: helper.writes,
            }))),
            Err(error) => {
                self.files.end(&id, &cut_off);
                Err(error)
            }
        }
    }

    async fn begin_work(
        self: &Arc<Self>,
        id: &ProcessId,
        request: FilesRequest,
        running: Option<Arc<AsyncFd<OwnedFd>>>,
    ) -> Result<(Ground, Helper)> {
        let FilesRequest { layers, volumes, operation } = request;
        let (agent, owned) = (self.clone(), id.clone());
        let on_upper = matches!(
            operation,
            FilesOperation::Changes { .. } | FilesOperation::Diff { .. } | FilesOperation::Size
        );
        let (ground, place) = blocking(move || match running {
            _ if on_upper => agent.writable_layer(&owned, &layers),
            Some(pidfd) => Ok((Ground::Running(pidfd), FilesPlace::Running)),
            None => agent.stopped_root(&owned, &layers, &volumes),
        })
        .await?;
        let helper = self.spawn_helper(operation, &ground, place).await?;
        Ok((ground, helper))
    }

    fn writable_layer(&self, id: &ProcessId, layers: &[Layer]) -> Result<(Ground, FilesPlace)> {
        let layers = self.layers.hold(layers)?;
        let lower = layers.lower_directories();
        let lower = lower.iter().map(|path| path.to_string_lossy().into_owned()).collect();
        let upper = self.storage.open_upper(id)?;
        Ok((Ground::Upper { layer: upper, _below: layers }, FilesPlace::Upper(lower)))
    }

    fn stopped_root(
        &self,
        id: &ProcessId,
        layers: &[Layer],
        volumes: &[VolumeMount],
    ) -> Result<(Ground, FilesPlace)> {
        // The lock is held while it is mounted: the next one must find it.
        let mut inner = self.files.inner();
        if let Some(stopped) = inner.mounted.get(id).and_then(Weak::upgrade) {
            return Ok((Ground::Stopped(stopped), FilesPlace::Stopped));
        }
        let layers = self.layers.hold(layers)?;
        let root = self.storage.mount_root(id, &layers.lower_directories(), false)?;
        let attached =
            if volumes.is_empty() { None } else { Some(self.attach_with_volumes(id, &root, volumes)?) };
        let stopped = Arc::new(Stopped { root, _attached: attached, _layers: layers });
        inner.mounted.insert(id.clone(), Arc::downgrade(&stopped));
        Ok((Ground::Stopped(stopped), FilesPlace::Stopped))
    }

    /// Mounts a stopped container's root, and its volumes in it.
    fn attach_with_volumes(
        &self,
        id: &ProcessId,
        root: &OwnedFd,
        volumes: &[VolumeMount],
    ) -> Result<Attached> {
        let directories = self.volumes.prepare(root, volumes)?;
        let step = "mount a stopped container's root";
        let place = self.stopped.join(id.as_str());
        std::fs::create_dir_all(&place).at_kind(ErrorKind::Internal, step)?;
        let target = open_directory(&place).at_kind(ErrorKind::Internal, step)?;
        mounts::attach(root, target).at_kind(ErrorKind::Internal, step)?;
        let attached = Attached(place);
        let root = RootDir::new(root.try_clone().at_kind(ErrorKind::Internal, step)?);
        mount_volumes(&root, volumes, &directories)?;
        Ok(attached)
    }

    async fn spawn_helper(
        &self,
        operation: FilesOperation,
        ground: &Ground,
        place: FilesPlace,
    ) -> Result<Helper> {
        let step = "make a helper's streams";
        let (their_input, input) = pipe_with(PipeFlags::CLOEXEC).at_kind(ErrorKind::Internal, step)?;
        let (output, their_output) = pipe_with(PipeFlags::CLOEXEC).at_kind(ErrorKind::Internal, step)?;
        let (_report, child_report) = packet::pair().at_kind(ErrorKind::Internal, step)?;
        let null = std::fs::File::open("/dev/null").at_kind(ErrorKind::Internal, step)?;
        let writes = matches!(operation, FilesOperation::Write { .. });
        let task = FilesTask { operation, place, die_with_agent: self.die_with_agent };
        let cloned = {
            let _starting = self.reaper.starting();
            let fds = TaskFds {
                report: child_report.as_fd(),
                cgroup: self.files.cgroup.as_fd(),
                place: ground.as_fd(),
                pid_donor: None,
                ipc_donor: None,
                network: None,
                stdio: Some([their_input.as_fd(), their_output.as_fd(), null.as_fd()]),
            };
            let cloned = self.fork_server.spawn(OrderRef::Files(&task), fds).await?;
            self.reaper.is_awaited(cloned.pid);
            cloned
        };
        let tie = |step| move |error| crate::error::from_io(ErrorKind::Internal, step, &error);
        Ok(Helper {
            pid: cloned.pid,
            pidfd: watch_fd(cloned.pidfd, "the helper")?,
            input: pipe::Sender::from_owned_fd(nonblocking(input)?).map_err(tie("watch a helper"))?,
            output: pipe::Receiver::from_owned_fd(nonblocking(output)?).map_err(tie("watch a helper"))?,
            writes,
        })
    }
}

fn nonblocking(fd: OwnedFd) -> Result<OwnedFd> {
    rustix::io::ioctl_fionbio(&fd, true).at_kind(ErrorKind::Internal, "watch a helper")?;
    Ok(fd)
}

/// A new helper's ends.
struct Helper {
    pid: u32,
    pidfd: AsyncFd<OwnedFd>,
    input: pipe::Sender,
    output: pipe::Receiver,
    writes: bool,
}

impl Ground {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        match self {
            Self::Running(pidfd) => pidfd.get_ref().as_fd(),
            Self::Stopped(stopped) => stopped.root.as_fd(),
            Self::Upper { layer, .. } => layer.as_fd(),
        }
    }
}

impl Session {
    /// Carries bytes between the host and the helper until the helper has said everything, or one of them is gone.
    pub(crate) async fn carry(mut self, io: impl AsyncRead + AsyncWrite) {
        if let Some(work) = self.0.take() {
            work.carry(io).await;
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // The host went away before the first byte.
        if let Some(work) = self.0.take() {
            tokio::spawn(work.end());
        }
    }
}

impl Work {
    async fn carry(mut self, io: impl AsyncRead + AsyncWrite) {
        let (mut from_host, mut to_host) = tokio::io::split(io);
        let mut cut_off = self.cut_off.subscribe();
        let mut input = self.input.take();
        let writes = self.writes;
        let taking = async {
            let mut block = vec![0; BLOCK];
            loop {
                match from_host.read(&mut block).await {
                    Ok(0) => break,
                    Ok(len) => {
                        if let Some(pipe) = &mut input
                            && pipe.write_all(&block[..len]).await.is_err()
                        {
                            // The helper wants no more; what it has to say still comes.
                            input = None;
                        }
                    }
                    Err(_) => return,
                }
            }
            input = None;
            if writes {
                std::future::pending::<()>().await;
            }
            // Whoever reads does not close before the end, unless it is gone.
        };
        let giving = async {
            let mut block = vec![0; BLOCK];
            loop {
                match self.output.read(&mut block).await {
                    Ok(0) | Err(_) => break,
                    Ok(len) if to_host.write_all(&block[..len]).await.is_err() => return,
                    Ok(_) => {}
                }
            }
            let _ = to_host.shutdown().await;
        };
        tokio::select! {
            () = giving => {}
            () = taking => {}
            _ = cut_off.wait_for(|cut_off| *cut_off) => {}
        }
        self.end().await;
    }

    async fn end(self) {
        let Self { agent, id, pid, pidfd, input, output, ground, cut_off, .. } = self;
        drop((input, output));
        // One that has done its work has ended or is about to.
        let _ = sys::pidfd_send_signal(pidfd.get_ref().as_fd(), libc::SIGKILL as u8);
        let _ = processes::wait(&pidfd).await;
        agent.reaper.was_reaped(pid);
        // Unmounting writes everything to disk.
        let _ = tokio::task::spawn_blocking(move || drop(ground)).await;
        agent.files.end(&id, &cut_off);
    }
}

fn check(request: &FilesRequest) -> Result<()> {
    layers::check(&request.layers)?;
    check::volumes(&request.volumes)?;
    let path = match &request.operation {
        FilesOperation::Stat { path } | FilesOperation::Read { path } => path,
        FilesOperation::Write { path, .. } => path,
        _ => return Ok(()),
    };
    if path.contains('\0') {
        return Err(invalid("the path has a zero byte in it"));
    }
    Ok(())
}
