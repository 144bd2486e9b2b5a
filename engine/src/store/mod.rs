//! The engine's facts on disk: one record for each container, volume and network, in an embedded database that survives `kill -9` and power loss.
//!
//! The database is synchronous and has one writer, so writes go over a channel to a thread of their own; what arrives
//! together is committed together. A write is answered when it is durable. Records are opaque bytes here.

use std::{
    path::{Path, PathBuf},
    sync::{Mutex, mpsc},
    thread,
};

use redb::{Database, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition};
use tokio::sync::oneshot;

const CONTAINERS: Table = TableDefinition::new("containers");
const VOLUMES: Table = TableDefinition::new("volumes");
const NETWORKS: Table = TableDefinition::new("networks");
/// How many writes one commit takes at most.
const BATCH: usize = 256;

/// Why a record could not be read or written.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The database failed.
    #[error("the state file {path} failed: {reason}")]
    Database {
        /// The file.
        path: String,
        /// What the database said.
        reason: String,
    },
    /// The writer has ended.
    #[error("the state file is closed")]
    Closed,
}

type Table = TableDefinition<'static, &'static str, &'static [u8]>;

/// Keys and values.
pub(crate) type Records = Vec<(String, Vec<u8>)>;

/// Everything that is in the state file.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    /// Containers by id.
    pub(crate) containers: Records,
    /// Volumes by name.
    pub(crate) volumes: Records,
    /// Networks by id.
    pub(crate) networks: Records,
}

enum Change {
    Put(Vec<u8>),
    Delete,
}

struct Write {
    /// All of them count, or none.
    changes: Vec<(Table, String, Change)>,
    done: oneshot::Sender<Result<(), StoreError>>,
}

/// The open state file.
pub(crate) struct Store {
    writes: Mutex<Option<mpsc::Sender<Write>>>,
    writer: Mutex<Option<thread::JoinHandle<()>>>,
}

impl Store {
    /// Opens or makes the file, and reads every record.
    pub(crate) fn open(path: &Path) -> Result<(Self, Facts), StoreError> {
        let database = open_database(path)?;
        let facts = read_all(&database).map_err(|error| failed(path, error))?;
        let (writes, inbox) = mpsc::channel();
        let path = path.to_owned();
        let writer = thread::Builder::new()
            .name("state-writer".to_owned())
            .spawn(move || write_until_closed(path, database, &inbox))
            .expect("the system can start a thread");
        Ok((Self { writes: Mutex::new(Some(writes)), writer: Mutex::new(Some(writer)) }, facts))
    }

    /// Writes a container's record; returns when it is durable.
    pub(crate) async fn put(&self, id: &str, value: Vec<u8>) -> Result<(), StoreError> {
        self.write(CONTAINERS, id, Change::Put(value)).await
    }

    /// Removes a container's record, and at once with it those of volumes that go with it; returns when that is durable.
    pub(crate) async fn delete(&self, id: &str, volumes: &[&str]) -> Result<(), StoreError> {
        let gone = |table, key: &str| (table, key.to_owned(), Change::Delete);
        let volumes = volumes.iter().map(|name| gone(VOLUMES, name));
        self.write_all([gone(CONTAINERS, id)].into_iter().chain(volumes).collect()).await
    }

    /// Writes a volume's record; returns when it is durable.
    pub(crate) async fn put_volume(&self, name: &str, value: Vec<u8>) -> Result<(), StoreError> {
        self.write(VOLUMES, name, Change::Put(value)).await
    }

    /// Removes a volume's record; returns when that is durable.
    pub(crate) async fn delete_volume(&self, name: &str) -> Result<(), StoreError> {
        self.write(VOLUMES, name, Change::Delete).await
    }

    /// Writes a network's record; returns when it is durable.
    pub(crate) async fn put_network(&self, id: &str, value: Vec<u8>) -> Result<(), StoreError> {
        self.write(NETWORKS, id, Change::Put(value)).await
    }

    /// Removes a network's record; returns when that is durable.
    pub(crate) async fn delete_network(&self, id: &str) -> Result<(), StoreError> {
        self.write(NETWORKS, id, Change::Delete).await
    }

    /// Waits for the last write and closes the file.
    pub(crate) fn close(&self) {
        drop(self.writes.lock().expect("no holder panics").take());
        let writer = self.writer.lock().expect("no holder panics").take();
        if let Some(writer) = writer {
            let _ = writer.join();
        }
    }

    async fn write(&self, table: Table, key: &str, change: Change) -> Result<(), StoreError> {
        self.write_all(vec![(table, key.to_owned(), change)]).await
    }

    async fn write_all(&self, changes: Vec<(Table, String, Change)>) -> Result<(), StoreError> {
        let (done, answer) = oneshot::channel();
        let write = Write { changes, done };
        let writes = self.writes.lock().expect("no holder panics").clone().ok_or(StoreError::Closed)?;
        writes.send(write).map_err(|_| StoreError::Closed)?;
        answer.await.map_err(|_| StoreError::Closed)?
    }
}

fn failed(path: &Path, error: redb::Error) -> StoreError {
    StoreError::Database { path: path.display().to_string(), reason: error.to_string() }
}

fn open_database(path: &Path) -> Result<Database, StoreError> {
    Database::create(path).map_err(|error| failed(path, error.into()))
}

fn read_all(database: &Database) -> Result<Facts, redb::Error> {
    let transaction = database.begin_read()?;
    Ok(Facts {
        containers: read_table(&transaction, CONTAINERS)?,
        volumes: read_table(&transaction, VOLUMES)?,
        networks: read_table(&transaction, NETWORKS)?,
    })
}

fn read_table(transaction: &ReadTransaction, table: Table) -> Result<Records, redb::Error> {
    let table = match transaction.open_table(table) {
        Ok(table) => table,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let mut records = Vec::new();
    for entry in table.iter()? {
        let (key, value) = entry?;
        records.push((key.value().to_owned(), value.value().to_owned()));
    }
    Ok(records)
}

fn write_until_closed(path: PathBuf, database: Database, inbox: &mpsc::Receiver<Write>) {
    let mut database = Some(database);
    while let Ok(first) = inbox.recv() {
        let mut batch = vec![first];
        while batch.len() < BATCH
            && let Ok(next) = inbox.try_recv()
        {
            batch.push(next);
        }
        let result = commit_with(&path, &mut database, &batch);
        for write in batch {
            let _ = write.done.send(result.clone());
        }
    }
}

/// Commits; after a failure (a full disk, say) the database refuses further work until it is opened again, so that is done
/// on the next write.
fn commit_with(path: &Path, slot: &mut Option<Database>, batch: &[Write]) -> Result<(), StoreError> {
    let database = match slot.take() {
        Some(database) => database,
        None => open_database(path)?,
    };
    commit(&database, batch).map_err(|error| failed(path, error))?;
    *slot = Some(database);
    Ok(())
}

fn commit(database: &Database, batch: &[Write]) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    for (table, key, change) in batch.iter().flat_map(|write| &write.changes) {
        let mut table = transaction.open_table(*table)?;
        match change {
            Change::Put(value) => table.insert(key.as_str(), value.as_slice())?,
            Change::Delete => table.remove(key.as_str())?,
        };
    }
    transaction.commit()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_written_is_read_after_a_reopening() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.redb");
        let (store, facts) = Store::open(&path).unwrap();
        assert_eq!(facts, Facts::default());
        store.put("a", b"1".to_vec()).await.unwrap();
        store.put("b", b"2".to_vec()).await.unwrap();
        store.put("a", b"3".to_vec()).await.unwrap();
        for name in ["a", "b", "c"] {
            store.put_volume(name, b"4".to_vec()).await.unwrap();
        }
        store.delete("b", &["b", "c"]).await.unwrap();
        store.close();
        let (store, facts) = Store::open(&path).unwrap();
        assert_eq!(facts.containers, [("a".to_owned(), b"3".to_vec())]);
        assert_eq!(facts.volumes, [("a".to_owned(), b"4".to_vec())]);
        store.close();
    }
}
