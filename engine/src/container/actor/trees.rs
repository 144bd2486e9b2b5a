//! The trees of the host that a container mounts: opened and granted to its sandbox at each start, taken back when the run is over.

use coracle_agent_api::{BindMount, TreeName, TreeSource};

use super::Actor;
use crate::{
    container::{
        mounts::source,
        names,
        record::{Bind, ContainerId},
    },
    error::{Error, Result, chain},
    sandbox::TreeGrant,
    sandboxes::Host,
};

/// The container whose tree has this name.
pub(crate) fn container_of(name: &TreeName) -> Option<ContainerId> {
    name.as_str().split_once('-')?.0.parse().ok()
}

impl Actor {
    /// Grants what the container mounts of the host. What was granted before a failure is among [`Actor::trees`] too.
    pub(super) async fn grant_trees(&mut self, host: &Host) -> Result<Vec<BindMount>> {
        if self.record.binds.is_empty() {
            return Ok(Vec::new());
        }
        let (binds, sockets) = (self.record.binds.clone(), self.core.sockets());
        let open = move || {
            let opened = |bind: &Bind| (!bind.engine).then(|| source::open(bind, &sockets)).transpose();
            binds.iter().map(opened).collect::<Result<Vec<_>>>()
        };
        let opened = tokio::task::spawn_blocking(open).await??;
        // A name of its own for each start: a guest may remember what it knew by a name.
        let start = names::new_id();
        let mut mounts = Vec::with_capacity(opened.len());
        for (number, opened) in opened.into_iter().enumerate() {
            let bind = &self.record.binds[number];
            let (path, readonly) = (bind.path.clone(), bind.readonly);
            let Some(opened) = opened else {
                self.container.has_engine.send_replace(true);
                mounts.push(BindMount { source: TreeSource::Engine, path, readonly });
                continue;
            };
            let name = format!("{}-{}-{number}", self.record.id, start.short());
            let name = TreeName::try_from(name).map_err(|error| Error::internal(error.to_string()))?;
            let grant = TreeGrant { name: name.clone(), kind: opened.kind, read_only: bind.readonly };
            // Before it is there, so that it is taken back also if no one hears of it.
            self.trees.push(name);
            let source = host.grant(&grant, opened.tree).await?;
            mounts.push(BindMount { source, path, readonly });
        }
        Ok(mounts)
    }

    /// The container's run is over, or came to nothing: it needs neither layers nor trees any more.
    pub(super) async fn let_go(&mut self, host: &Host) {
        host.release(&self.record.id).await;
        self.revoke_trees(host).await;
    }

    /// Takes back what was granted. What cannot be taken back now is tried again the next time.
    pub(super) async fn revoke_trees(&mut self, host: &Host) {
        self.container.has_engine.send_replace(false);
        let mut left = Vec::new();
        for name in std::mem::take(&mut self.trees) {
            if let Err(error) = host.revoke(&name).await {
                tracing::error!(tree = %name, error = chain(&error), "cannot take back a tree of the host");
                left.push(name);
            }
        }
        self.trees = left;
    }

    /// Finds what an earlier daemon granted to the container.
    pub(super) async fn adopt_trees(&mut self, host: &Host) {
        if self.record.binds.is_empty() {
            return;
        }
        self.container.has_engine.send_replace(self.record.binds.iter().any(|bind| bind.engine));
        match host.grants().await {
            Ok(grants) => {
                let ours = |name: &TreeName| container_of(name).as_ref() == Some(&self.record.id);
                self.trees = grants.into_iter().filter(ours).collect();
            }
            Err(error) => {
                tracing::error!(error = chain(&error), "cannot learn which trees of the host a container has")
            }
        }
    }
}
