//! A machine's file server: one `coracle-fsd` process beside the VMM, which serves the trees that were granted, and ends with the machine. Like
//! the VMM it outlives the daemon, and the next daemon asks it for its grants. What it says is checked as the VMM's words are.
//!
//! When it is lost, so are the files of the host in the machine, until the machine is started again; everything else there goes on.

use std::{
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream as StdUnixStream,
    },
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use coracle_agent_api::{HOST_TAG, TreeName, TreeSource};
use coracle_engine::sandbox::{TreeGrant, TreeKind};
use coracle_file_server::control::{Client, ClientError, Grant, GrantId, GrantKind, Owners};
use tokio::sync::watch;

use super::{
    folder::Folder,
    process::{self, VmmProcess},
};
use crate::failure::describe;

/// How long a server that was found may take to say what it serves.
const ADOPT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long it may take to end when its machine has.
const GRACE: Duration = Duration::from_secs(5);
const GONE: &str = "its file server has ended";

// What the agent mounts is what the machine has.
const _: () = assert!(same(HOST_TAG, coracle_vmm::control::FILE_SYSTEM_TAG));

const fn same(one: &str, other: &str) -> bool {
    let (one, other) = (one.as_bytes(), other.as_bytes());
    let mut index = 0;
    while index < one.len() && index < other.len() && one[index] == other[index] {
        index += 1;
    }
    index == one.len() && index == other.len()
}

/// The file server of one machine.
#[derive(Debug)]
pub(super) struct Files {
    /// Nothing if none was found.
    client: Option<Arc<Client>>,
    lost: watch::Receiver<Option<String>>,
    /// Only if this daemon started it.
    process: Option<VmmProcess>,
}

impl Files {
    /// Starts the server of a machine that is about to be booted; also gives the VMM's end of the socket between the two. Nobody waits for the
    /// server to come up: what it is asked waits for it.
    pub(super) fn start(folder: &Folder) -> Result<(Self, OwnedFd)> {
        let listener = folder.listen_for_files()?;
        let log = folder.open_log(&folder.file_server_log())?;
        let process = process::spawn_as(process::FILE_SERVER_NAME, listener, log)?;
        let control = folder.connect_to_files()?.context("the file server does not listen")?;
        let (client, report) = connect(control)?;
        let lost = report.subscribe();
        let (ours, theirs) = StdUnixStream::pair().context("cannot make a pair of sockets")?;
        let serving = Arc::clone(&client);
        tokio::task::spawn_blocking(move || {
            if let Err(error) = serving.serve(theirs.as_fd()) {
                report.send_replace(Some(format!("its file server does not serve it: {}", words(error))));
            }
        });
        Ok((Self { client: Some(client), lost, process: Some(process) }, ours.into()))
    }

    /// Takes over the server of a machine that runs.
    pub(super) async fn adopt(folder: &Folder) -> Self {
        match find(folder).await {
            Ok((client, lost)) => Self { client: Some(client), lost, process: None },
            Err(error) => {
                let reason = Some(format!("its file server cannot be taken over: {}", describe(&error)));
                Self { client: None, lost: watch::channel(reason).1, process: None }
            }
        }
    }

    /// The process id, if this daemon started it.
    pub(super) fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(|process| process.pid)
    }

    /// Waits until the server is lost; why.
    pub(super) async fn lost(&self) -> String {
        match self.lost.clone().wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            Err(_) => GONE.to_owned(),
        }
    }

    /// Opens a tree to the machine.
    pub(super) async fn grant(&self, grant: &TreeGrant, owners: Owners, tree: OwnedFd) -> Result<TreeSource> {
        let name = grant.name.clone();
        let grant = Grant {
            id: id(&name)?,
            kind: match grant.kind {
                TreeKind::Directory => GrantKind::Directory,
                TreeKind::File => GrantKind::File,
            },
            read_only: grant.read_only,
            owners,
        };
        self.call(move |client| client.grant(grant, tree.as_fd())).await?;
        Ok(TreeSource::Shared { name })
    }

    /// Closes a tree, if it is open.
    pub(super) async fn revoke(&self, name: &TreeName) -> Result<()> {
        if self.is_lost() {
            return Ok(());
        }
        let id = id(name)?;
        self.call(move |client| match client.revoke(id.clone()) {
            // It refuses what it does not have.
            Err(refused @ ClientError::Refused { .. }) => {
                let has = client.status()?.grants.iter().any(|grant| grant.id == id);
                if has { Err(refused) } else { Ok(()) }
            }
            result => result,
        })
        .await
    }

    /// The names of the trees that are open.
    pub(super) async fn grants(&self) -> Result<Vec<TreeName>> {
        if self.is_lost() {
            return Ok(Vec::new());
        }
        let status = self.call(Client::status).await?;
        status
            .grants
            .into_iter()
            .map(|grant| TreeName::try_from(String::from(grant.id)).map_err(Into::into))
            .collect()
    }

    /// Sees to it that the server is gone, now that its machine is.
    pub(super) async fn end(&self) {
        let Some(process) = &self.process else { return };
        if tokio::time::timeout(GRACE, process.wait()).await.is_err() {
            tracing::warn!(pid = process.pid, "the file server does not end with its machine; killing it");
            process.kill();
            process.wait().await;
        }
    }

    fn is_lost(&self) -> bool {
        self.lost.borrow().is_some()
    }

    async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Client) -> Result<T, ClientError> + Send + 'static,
    ) -> Result<T> {
        let advice =
            "the host's files are not there until it is started again (`coracle down`, `coracle up`)";
        let lost = self.lost.borrow().clone();
        let client = match (&self.client, lost) {
            (Some(client), None) => Arc::clone(client),
            (_, reason) => return Err(anyhow!("{}; {advice}", reason.as_deref().unwrap_or(GONE))),
        };
        Ok(tokio::task::spawn_blocking(move || call(&client)).await??)
    }
}

type Lost = watch::Receiver<Option<String>>;

/// Takes a control socket into use.
fn connect(control: OwnedFd) -> Result<(Arc<Client>, watch::Sender<Option<String>>)> {
    let (report, _) = watch::channel(None);
    let on_closed = report.clone();
    let client = Client::new(control, move || {
        on_closed.send_if_modified(|reason| {
            reason.is_none() && {
                *reason = Some(GONE.to_owned());
                true
            }
        });
    })
    .context("cannot use the file server's control socket")?;
    Ok((Arc::new(client), report))
}

async fn find(folder: &Folder) -> Result<(Arc<Client>, Lost)> {
    let control = folder.connect_to_files()?.context("it has ended")?;
    let (client, report) = connect(control)?;
    let asked = Arc::clone(&client);
    let status = tokio::task::spawn_blocking(move || asked.status());
    let status = tokio::time::timeout(ADOPT_TIMEOUT, status).await.context("it does not answer")???;
    if !status.serving {
        return Err(anyhow!("it serves no machine"));
    }
    Ok((client, report.subscribe()))
}

fn id(name: &TreeName) -> Result<GrantId> {
    Ok(GrantId::try_from(name.as_str().to_owned())?)
}

fn words(error: ClientError) -> String {
    describe(&anyhow::Error::new(error))
}

/// Whom the files belong to in the machine: to whom they do on the host if this is root, who may be anybody; otherwise to root there.
pub(super) fn owners() -> Owners {
    if rustix::process::geteuid().is_root() { Owners::Real } else { Owners::Kept { uid: 0, gid: 0 } }
}
