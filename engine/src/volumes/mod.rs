//! Volumes: names for directories on a sandbox's data disk that outlive containers. The daemon's record is the fact; the directory comes
//! into being when a container first mounts it, and goes when the record has gone, at the latest when the sandbox starts again.

use std::{
    collections::BTreeMap,
    sync::{Arc, RwLock},
};

use coracle_agent_api::{DATA_DISK, VolumeId, VolumeMount};
use serde::{Deserialize, Serialize};

use crate::{
    container::{
        mounts::WantedVolume,
        names,
        record::{Attachment, Record},
    },
    core::Core,
    error::{Error, Result, chain},
    sandbox::SandboxId,
    store::{Records, Store},
    time::UnixNanos,
};

/// The label by which Docker's clients know a volume that no one has named.
pub(crate) const ANONYMOUS: &str = "com.docker.volume.anonymous";
const FORMAT: u32 = 1;

/// A volume's record.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Volume {
    format: u32,
    pub(crate) name: String,
    id: String,
    pub(crate) sandbox: SandboxId,
    pub(crate) created: UnixNanos,
    pub(crate) labels: BTreeMap<String, String>,
}

impl Volume {
    fn new(name: String, sandbox: SandboxId, labels: BTreeMap<String, String>) -> Self {
        let id = names::new_id().to_string();
        Self { format: FORMAT, name, id, sandbox, created: UnixNanos::now(), labels }
    }

    fn decode(bytes: &[u8]) -> Result<Self, String> {
        let volume: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if volume.format > FORMAT {
            return Err(format!("it was written by a newer version (format {})", volume.format));
        }
        volume.id.parse::<VolumeId>().map_err(|error| error.to_string())?;
        Ok(volume)
    }

    fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a record has no map with odd keys")
    }

    /// What the agent calls it.
    pub(crate) fn id(&self) -> VolumeId {
        self.id.parse().expect("checked when the record was made or read")
    }

    pub(crate) fn is_anonymous(&self) -> bool {
        self.labels.contains_key(ANONYMOUS)
    }

    /// Where its files are, in its sandbox.
    pub(crate) fn mountpoint(&self) -> String {
        format!("{DATA_DISK}/volumes/{}/data", self.id)
    }
}

/// All volumes.
pub(crate) struct Volumes {
    by_name: RwLock<BTreeMap<String, Arc<Volume>>>,
    /// There are records that could not be read: nothing that seems unknown must be deleted.
    unreadable: bool,
    /// Held while one is made, so that no one hears of it before it is on disk.
    making: tokio::sync::Mutex<()>,
    /// Held for reading while a container is made of volumes, for writing while one is removed.
    pub(crate) gate: tokio::sync::RwLock<()>,
}

/// Docker's words for a volume that is not there.
pub(crate) fn no_such_volume(name: &str) -> Error {
    Error::not_found(format!("get {}: no such volume", shown(name)))
}

fn shown(name: &str) -> String {
    name.chars().take(300).collect()
}

impl Volumes {
    /// From the records on disk.
    pub(crate) fn load(records: Records) -> Self {
        let mut by_name = BTreeMap::new();
        let mut unreadable = false;
        for (name, bytes) in records {
            match Volume::decode(&bytes) {
                Ok(volume) => drop(by_name.insert(name, Arc::new(volume))),
                Err(error) => {
                    tracing::error!(
                        name,
                        error,
                        "the record of a volume cannot be used; it is left as it is"
                    );
                    unreadable = true;
                }
            }
        }
        Self {
            by_name: RwLock::new(by_name),
            unreadable,
            making: tokio::sync::Mutex::default(),
            gate: tokio::sync::RwLock::default(),
        }
    }

    pub(crate) fn find(&self, name: &str) -> Result<Arc<Volume>> {
        self.by_name.read().expect("no holder panics").get(name).cloned().ok_or_else(|| no_such_volume(name))
    }

    /// All, by name.
    pub(crate) fn all(&self) -> Vec<Arc<Volume>> {
        self.by_name.read().expect("no holder panics").values().cloned().collect()
    }

    /// Those whose files are in a sandbox; `None` if not all of them are known.
    pub(crate) fn ids_in(&self, sandbox: &SandboxId) -> Option<Vec<VolumeId>> {
        let here = |volume: &Arc<Volume>| (volume.sandbox == *sandbox).then(|| volume.id());
        (!self.unreadable).then(|| self.all().iter().filter_map(here).collect())
    }

    /// The volume of this name, made if there is none (then `true`). Without a name it is a new one, which counts as anonymous.
    pub(crate) async fn make(
        &self,
        store: &Store,
        name: Option<&str>,
        mut labels: BTreeMap<String, String>,
    ) -> Result<(Arc<Volume>, bool)> {
        let name = match name {
            Some(name) => check_name(name)?.to_owned(),
            None => {
                labels.insert(ANONYMOUS.to_owned(), String::new());
                names::new_id().to_string()
            }
        };
        let _alone = self.making.lock().await;
        if let Ok(volume) = self.find(&name) {
            return Ok((volume, false));
        }
        let volume = Arc::new(Volume::new(name.clone(), SandboxId::shared(), labels));
        store.put_volume(&name, volume.encode()).await?;
        self.by_name.write().expect("no holder panics").insert(name, Arc::clone(&volume));
        Ok((volume, true))
    }
}

/// Docker's rule for names of local volumes.
fn check_name(name: &str) -> Result<&str> {
    if name.len() == 1 {
        return Err(Error::invalid(
            "volume name is too short, names should be at least two alphanumeric characters",
        ));
    }
    let mut bytes = name.bytes();
    let legal = bytes.next().is_some_and(|first| first.is_ascii_alphanumeric())
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'));
    if legal && name.len() <= 255 {
        return Ok(name);
    }
    let name = shown(name);
    Err(Error::invalid(format!(
        "create {name}: \"{name}\" includes invalid characters for a local volume name, only \"[a-zA-Z0-9][a-zA-Z0-9_.-]\" are allowed. If you intended to pass a host directory, use absolute path"
    )))
}

impl Core {
    /// The containers that mount a volume, running or not.
    pub(crate) fn users_of_volume(&self, name: &str) -> Vec<String> {
        let uses = |record: &Record| record.volumes.iter().any(|attachment| attachment.volume == name);
        let all = self.containers.all();
        all.iter()
            .filter(|container| uses(&container.record()))
            .map(|container| container.id().to_string())
            .collect()
    }

    /// Makes the volumes that a new container wants and that there are not yet; those that were made for it come second. The caller
    /// holds the volumes' gate.
    pub(crate) async fn make_volumes(
        &self,
        wanted: Vec<WantedVolume>,
    ) -> Result<(Vec<Attachment>, Vec<Arc<Volume>>)> {
        let (mut attachments, mut made) = (Vec::new(), Vec::new());
        for WantedVolume { name, labels, attachment } in wanted {
            match self.volumes.make(&self.store, name.as_deref(), labels).await {
                Ok((volume, is_new)) => {
                    attachments.push(Attachment { volume: volume.name.clone(), ..attachment });
                    if is_new {
                        self.events.volume("create", &volume.name, &[]);
                        made.push(volume);
                    }
                }
                Err(error) => {
                    self.undo_volumes(&made).await;
                    return Err(error);
                }
            }
        }
        Ok((attachments, made))
    }

    /// Removes those of these volumes that no one has named: the container that they were made for has come to nothing.
    pub(crate) async fn undo_volumes(&self, made: &[Arc<Volume>]) {
        for volume in made.iter().filter(|volume| volume.is_anonymous()) {
            if let Err(error) = self.drop_volume(volume).await {
                tracing::warn!(%error, volume = volume.name, "cannot remove a volume");
            }
        }
    }

    /// Removes a volume that no container uses.
    pub(crate) async fn remove_volume(&self, name: &str) -> Result<()> {
        let _alone = self.volumes.gate.write().await;
        let volume = self.volumes.find(name)?;
        let users = self.users_of_volume(name);
        if !users.is_empty() {
            let message = format!("remove {}: volume is in use - [{}]", shown(name), users.join(", "));
            return Err(Error::conflict(message));
        }
        self.drop_volume(&volume).await
    }

    /// The volumes of a container without a name that no other container has. The caller holds the volumes' gate.
    pub(crate) fn volumes_of_no_other(&self, record: &Record) -> Vec<Arc<Volume>> {
        let mut names: Vec<&str> =
            record.volumes.iter().map(|attachment| attachment.volume.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        let lonely = |volume: &Arc<Volume>| {
            let users = self.users_of_volume(&volume.name);
            volume.is_anonymous() && users.iter().all(|user| user == record.id.as_str())
        };
        names.into_iter().filter_map(|name| self.volumes.find(name).ok()).filter(lonely).collect()
    }

    async fn drop_volume(&self, volume: &Volume) -> Result<()> {
        self.store.delete_volume(&volume.name).await?;
        self.volume_is_gone(volume).await;
        Ok(())
    }

    /// The record of a volume is deleted: no one finds it any more, and its files go.
    pub(crate) async fn volume_is_gone(&self, volume: &Volume) {
        self.volumes.by_name.write().expect("no holder panics").remove(&volume.name);
        let host = self.sandboxes.get(&volume.sandbox);
        // What a sandbox that does not run keeps of it goes when it is started again.
        if host.is_running()
            && let Err(error) = host.agent().remove_volume(&volume.id()).await
        {
            tracing::warn!(error = chain(&error), volume = volume.name, "cannot remove a volume's files now");
        }
        self.events.volume("destroy", &volume.name, &[]);
    }

    /// What the agent is told to mount for a container.
    pub(crate) fn volume_mounts(&self, record: &Record) -> Result<Vec<VolumeMount>> {
        let is_first_start = record.state.started.is_none();
        let mount = |attachment: &Attachment| {
            Ok(VolumeMount {
                volume: self.volumes.find(&attachment.volume)?.id(),
                path: attachment.path.clone(),
                subpath: attachment.subpath.clone(),
                readonly: attachment.readonly,
                copy_up: is_first_start && !attachment.no_copy,
            })
        };
        record.volumes.iter().map(mount).collect()
    }

    /// Tells that a container has taken its volumes, or let go of them.
    pub(crate) fn tell_of_volumes(&self, action: &str, record: &Record) {
        for Attachment { volume, path, readonly, .. } in &record.volumes {
            let read_write = if *readonly { "false" } else { "true" };
            let mount = [("destination", path.as_str()), ("propagation", ""), ("read/write", read_write)];
            let further = if action == "mount" { &mount[..] } else { &[] };
            self.events.volume(action, volume, &[&[("container", record.id.as_str())], further].concat());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_as_docker_checks_them() {
        for good in ["db", "a.b-c_d", "0x", &"n".repeat(255)] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", "a", ".a", "-a", "a/b", "a b", "../x", "ü1", &"n".repeat(256)] {
            assert_eq!(check_name(bad).unwrap_err().status(), 400, "{bad}");
        }
    }

    #[test]
    fn a_record_that_cannot_be_read_keeps_every_volume() {
        let volume = Volume::new("good".to_owned(), SandboxId::shared(), BTreeMap::new());
        let good = ("good".to_owned(), volume.encode());
        assert_eq!(Volumes::load(vec![good.clone()]).ids_in(&SandboxId::shared()), Some(vec![volume.id()]));
        let volumes = Volumes::load(vec![good, ("bad".to_owned(), b"{}".to_vec())]);
        assert_eq!(volumes.ids_in(&SandboxId::shared()), None);
        assert!(volumes.find("good").is_ok() && volumes.find("bad").is_err());
    }
}
