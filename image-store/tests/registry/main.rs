//! Pulls from registries that keep the rules, and from such as do not.
#![allow(missing_docs, unreachable_pub)]

#[path = "../common/mod.rs"]
mod common;
mod double;
mod hostile;
mod pull;
mod push;
mod tokens;
mod ways;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use coracle_image_store::registry::{
    Credentials, Proxies, Pull, PullEvent, Pulled, Registries, RegistryError, RegistrySettings, Retries,
};
use coracle_image_store::{ImageStore, Reference};
use tokio::sync::mpsc;

use common::Tar;

/// A store and the way to registries.
struct Place {
    root: tempfile::TempDir,
    store: Arc<ImageStore>,
    registries: Registries,
    settings: RegistrySettings,
}

impl Place {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let store = Arc::new(ImageStore::open(root.path()).unwrap());
        let registries = Registries::new(Arc::clone(&store));
        let retries = Retries {
            attempts: 4,
            delay: Duration::from_millis(1),
            max_delay: Duration::from_secs(2),
            idle: Duration::from_millis(1500),
        };
        let none = String::new;
        let proxies = Proxies::Fixed { http: none(), https: none(), no: none() };
        let settings = RegistrySettings { retries, proxies, ..RegistrySettings::default() };
        Self { root, store, registries, settings }
    }

    async fn pull(&self, name: &str) -> Result<Pulled, RegistryError> {
        self.pull_as(name, None, None).await.0
    }

    async fn pull_as(
        &self,
        name: &str,
        platform: Option<&str>,
        credentials: Option<Credentials>,
    ) -> (Result<Pulled, RegistryError>, Vec<PullEvent>) {
        let (sender, mut events) = mpsc::channel(1000);
        let pull = Pull {
            reference: Reference::parse(name).unwrap(),
            platform: platform.map(|platform| platform.parse().unwrap()),
            credentials,
        };
        let result = self.registries.pull(&self.settings, &pull, &sender).await;
        drop(sender);
        let mut seen = Vec::new();
        while let Some(event) = events.recv().await {
            seen.push(event);
        }
        (result, seen)
    }

    /// The pull must fail, and leave nothing behind.
    async fn refuses(&self, name: &str) -> String {
        let error = self.pull(name).await.expect_err("the pull is refused");
        self.is_empty().await;
        chain(&error)
    }

    async fn is_empty(&self) {
        assert!(self.store.list().unwrap().is_empty());
        // Downloads that were let go end a moment later.
        let left = || -> Vec<String> {
            ["tmp", "layers", "blobs/sha256"]
                .iter()
                .flat_map(|name| files(&self.root.path().join(name)))
                .collect()
        };
        let begun = std::time::Instant::now();
        while !left().is_empty() && begun.elapsed() < Duration::from_secs(5) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(left(), Vec::<String>::new());
    }
}

fn files(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

/// A layer with a file of this many bytes that do not pack well.
fn layer(name: &str, size: usize) -> Vec<u8> {
    let mut state = 88_172_645_463_325_252_u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[0]
    })
    .take(size)
    .collect();
    Tar::new().dir("etc").file(&format!("etc/{name}"), &noise).finish()
}
