//! Places where the store's tests let the process die. Outside of tests there are none.

/// Something on disk is about to change.
#[cfg(not(test))]
#[inline(always)]
pub(crate) fn point() {}

/// Something on disk is about to change: here the process dies if the environment says that this is the one.
#[cfg(test)]
pub(crate) fn point() {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static LAST: OnceLock<Option<u64>> = OnceLock::new();
    static PASSED: AtomicU64 = AtomicU64::new(0);
    let last = LAST.get_or_init(|| std::env::var(DIE_AT).ok().and_then(|text| text.parse().ok()));
    if let Some(last) = last
        && PASSED.fetch_add(1, Ordering::SeqCst) == *last
    {
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
            .expect("one can kill oneself");
        loop {
            std::thread::park();
        }
    }
}

/// Names the place where the process dies, counted from 0.
#[cfg(test)]
pub(crate) const DIE_AT: &str = "CORACLE_TEST_DIE_AT";

/// The database's file, with a place before each change.
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct Backend(pub(crate) redb::backends::FileBackend);

#[cfg(test)]
impl redb::StorageBackend for Backend {
    fn len(&self) -> std::io::Result<u64> {
        self.0.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
        self.0.read(offset, out)
    }

    fn set_len(&self, len: u64) -> std::io::Result<()> {
        point();
        self.0.set_len(len)
    }

    fn sync_data(&self) -> std::io::Result<()> {
        point();
        self.0.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        point();
        self.0.write(offset, data)
    }

    fn close(&self) -> std::io::Result<()> {
        self.0.close()
    }
}
