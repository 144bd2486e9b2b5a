//! Which containers there are, by id and by name.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, RwLock},
};

use super::{
    Container, names,
    record::{ContainerId, Record},
};
use crate::error::{Error, Result};

#[derive(Default)]
struct Inner {
    by_id: BTreeMap<ContainerId, Arc<Container>>,
    by_name: HashMap<String, ContainerId>,
}

/// See the module.
#[derive(Default)]
pub(crate) struct Registry {
    inner: RwLock<Inner>,
}

/// Docker's words for a container that is not there.
pub(crate) fn no_such_container(name: &str) -> Error {
    Error::not_found(format!("No such container: {}", name.chars().take(300).collect::<String>()))
}

impl Registry {
    /// Takes a name for a new container, or makes one up.
    pub(crate) fn reserve(&self, wanted: Option<&str>, id: &ContainerId) -> Result<String> {
        let mut inner = self.inner.write().expect("no holder panics");
        let name = match wanted {
            Some(name) => names::check(name)?.to_owned(),
            None => {
                (0..).map(names::make_up).find(|name| !inner.by_name.contains_key(name)).unwrap_or_default()
            }
        };
        take_name(&mut inner, name, id)
    }

    /// Gives a name another owner's place: from `old` to `new`.
    pub(crate) fn rename(&self, id: &ContainerId, old: &str, new: &str) -> Result<String> {
        let mut inner = self.inner.write().expect("no holder panics");
        let name = take_name(&mut inner, names::check(new)?.to_owned(), id)?;
        inner.by_name.remove(old);
        Ok(name)
    }

    /// Gives a reserved name back.
    pub(crate) fn release(&self, name: &str) {
        self.inner.write().expect("no holder panics").by_name.remove(name);
    }

    /// Adds a container whose name is reserved.
    pub(crate) fn insert(&self, container: &Arc<Container>) {
        let mut inner = self.inner.write().expect("no holder panics");
        inner.by_id.insert(container.id().clone(), Arc::clone(container));
    }

    /// Forgets a container and its name.
    pub(crate) fn remove(&self, record: &Record) {
        let mut inner = self.inner.write().expect("no holder panics");
        inner.by_id.remove(&record.id);
        inner.by_name.remove(&record.name);
    }

    /// The container of a full id, a name, or an unambiguous beginning of an id.
    pub(crate) fn find(&self, text: &str) -> Result<Arc<Container>> {
        let inner = self.inner.read().expect("no holder panics");
        if let Some(container) = text.parse().ok().and_then(|id: ContainerId| inner.by_id.get(&id)) {
            return Ok(Arc::clone(container));
        }
        let name = text.strip_prefix('/').unwrap_or(text);
        if let Some(container) = inner.by_name.get(name).and_then(|id| inner.by_id.get(id)) {
            return Ok(Arc::clone(container));
        }
        if text.is_empty() {
            return Err(no_such_container(text));
        }
        let mut matching = inner
            .by_id
            .iter()
            .filter(|(id, _)| id.as_str().starts_with(text))
            .map(|(_, container)| container);
        match (matching.next(), matching.next()) {
            (Some(container), None) => Ok(Arc::clone(container)),
            (Some(_), Some(_)) => {
                Err(Error::invalid(format!("multiple IDs found with provided prefix: {text}")))
            }
            (None, _) => Err(no_such_container(text)),
        }
    }

    /// All containers, newest first.
    pub(crate) fn all(&self) -> Vec<Arc<Container>> {
        let mut all: Vec<_> = self.inner.read().expect("no holder panics").by_id.values().cloned().collect();
        all.sort_by_cached_key(|container| {
            std::cmp::Reverse((container.record().created, container.id().clone()))
        });
        all
    }
}

fn take_name(inner: &mut Inner, name: String, id: &ContainerId) -> Result<String> {
    if let Some(owner) = inner.by_name.get(&name) {
        return Err(Error::conflict(format!(
            "Conflict. The container name \"/{name}\" is already in use by container \"{owner}\". You have to remove (or rename) that container to be able to reuse that name."
        )));
    }
    inner.by_name.insert(name.clone(), id.clone());
    Ok(name)
}
