//! Layers that someone reads stay, even if the last image that has them is removed meanwhile.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use tracing::warn;

use super::ImageStore;
use crate::digest::Digest;

/// How many read each layer.
#[derive(Debug, Default)]
pub(super) struct Pins(Mutex<HashMap<Digest, usize>>);

impl Pins {
    pub(super) fn holds(&self, layer: &Digest) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains_key(layer)
    }

    pub(super) fn add(&self, layer: &Digest) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(*layer).or_default() += 1;
    }
}

/// Keeps layers' files as long as it lives.
#[derive(Debug)]
pub struct PinnedLayers<'a> {
    store: &'a ImageStore,
    layers: Vec<Digest>,
}

impl ImageStore {
    /// Keeps the files of these layers until the answer is dropped.
    pub fn pin(&self, layers: impl IntoIterator<Item = Digest>) -> PinnedLayers<'_> {
        let layers: Vec<_> = layers.into_iter().collect();
        let mut pins = self.pins.0.lock().unwrap_or_else(PoisonError::into_inner);
        layers.iter().for_each(|layer| *pins.entry(*layer).or_default() += 1);
        PinnedLayers { store: self, layers }
    }
}

impl Drop for PinnedLayers<'_> {
    fn drop(&mut self) {
        self.store.unpin(&self.layers);
    }
}

impl ImageStore {
    /// Takes one pin of each away; the files of those that nobody needs then go.
    pub(super) fn unpin(&self, layers: &[Digest]) {
        let _changes = self.lock();
        let mut pins = self.pins.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut free = Vec::new();
        for layer in layers {
            let Some(count) = pins.get_mut(layer) else { continue };
            *count -= 1;
            if *count == 0 {
                pins.remove(layer);
                free.push(*layer);
            }
        }
        drop(pins);
        if free.is_empty() {
            return;
        }
        match self.db.references() {
            Ok(references) => free
                .iter()
                .filter(|layer| !references.layers.contains(layer))
                .for_each(|layer| self.files.remove_layer(layer)),
            // They are found at the next start.
            Err(error) => warn!(%error, "cannot tell whether layers are still needed"),
        }
    }
}
