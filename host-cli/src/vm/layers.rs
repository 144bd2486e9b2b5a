//! Which layer is where on a machine's layers disk, and which partition of it.
//!
//! The daemon writes its allocation to a file before it changes anything in the machine, so that a daemon that was killed
//! finds the layers of its running machine again without having to believe the guest. An entry that was being attached or
//! detached when the daemon died is marked, and is undone by the next one.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use coracle_agent_api::{DiffId, LayerSource};
use serde::{Deserialize, Serialize};

/// Capacity of the layers disk in bytes, fixed for a machine's life.
pub(crate) const CAPACITY: u64 = 16 << 40;
/// Segments begin at multiples of this.
const ALIGNMENT: u64 = 1 << 20;
/// The kernel's limit of partitions on one disk.
const MAX_PARTITIONS: u8 = 255;

/// Why a layer has no place.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LayersError {
    /// Every partition is in use.
    #[error(
        "all {MAX_PARTITIONS} layers that a machine can have at a time are in use: remove containers that are not needed"
    )]
    NoPartition,
    /// The disk has no gap of that size.
    #[error("no room for a layer of {0} bytes on the layers disk")]
    NoSpace(u64),
    /// The image's length is illegal.
    #[error("{0} bytes is no legal length of a layer's image")]
    Length(u64),
    /// The record cannot be kept.
    #[error("cannot keep the record of attached layers in {}", path.display())]
    Record {
        /// The record.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A layer's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Slot {
    /// Partition number.
    number: u8,
    /// First byte on the disk.
    pub(crate) start: u64,
    /// Length in bytes.
    pub(crate) len: u64,
    /// Being attached or detached: the machine may have it or not.
    unsettled: bool,
}

impl Slot {
    /// The place as the agent wants it.
    pub(crate) fn source(&self) -> LayerSource {
        LayerSource::Partition { number: self.number, start: self.start, len: self.len }
    }
}

/// The allocation of one machine.
#[derive(Debug)]
pub(crate) struct Layers {
    record: PathBuf,
    slots: BTreeMap<String, Slot>,
}

impl Layers {
    /// For a machine that was just started: no layers.
    pub(crate) fn fresh(record: PathBuf) -> Result<Self, LayersError> {
        let layers = Self { record, slots: BTreeMap::new() };
        layers.save()?;
        Ok(layers)
    }

    /// For a machine that runs: the layers that the record names. A record that is missing or unreadable means that none
    /// are known.
    pub(crate) fn load(record: PathBuf) -> Self {
        let slots = fs::read(&record)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_else(|| {
                tracing::warn!(record = %record.display(), "the record of attached layers cannot be read");
                BTreeMap::new()
            });
        Self { record, slots }
    }

    /// Entries that an earlier daemon did not finish with: the caller detaches them and calls [`Layers::forget`].
    pub(crate) fn unsettled(&self) -> Vec<(String, Slot)> {
        self.slots.iter().filter(|(_, slot)| slot.unsettled).map(|(id, slot)| (id.clone(), *slot)).collect()
    }

    /// Where a layer is, if it is attached.
    pub(crate) fn get(&self, diff_id: &DiffId) -> Option<Slot> {
        self.slots.get(diff_id.as_str()).filter(|slot| !slot.unsettled).copied()
    }

    /// Finds a place and records that the layer is about to be there.
    pub(crate) fn reserve(&mut self, diff_id: &DiffId, len: u64) -> Result<Slot, LayersError> {
        if len == 0 || !len.is_multiple_of(4096) || len > CAPACITY {
            return Err(LayersError::Length(len));
        }
        let number = (1..=MAX_PARTITIONS)
            .find(|number| self.slots.values().all(|slot| slot.number != *number))
            .ok_or(LayersError::NoPartition)?;
        let start = self.gap(len).ok_or(LayersError::NoSpace(len))?;
        let slot = Slot { number, start, len, unsettled: true };
        self.slots.insert(diff_id.as_str().to_owned(), slot);
        self.save().inspect_err(|_| {
            self.slots.remove(diff_id.as_str());
        })?;
        Ok(slot)
    }

    /// Records that the machine has the layer.
    pub(crate) fn settle(&mut self, diff_id: &DiffId) -> Result<(), LayersError> {
        self.mark(diff_id, false)
    }

    /// Records that the layer is about to be taken from the machine.
    pub(crate) fn unsettle(&mut self, diff_id: &DiffId) -> Result<(), LayersError> {
        self.mark(diff_id, true)
    }

    /// Records that the machine does not have the layer (any more).
    pub(crate) fn forget(&mut self, diff_id: &str) -> Result<(), LayersError> {
        self.slots.remove(diff_id);
        self.save()
    }

    fn mark(&mut self, diff_id: &DiffId, unsettled: bool) -> Result<(), LayersError> {
        if let Some(slot) = self.slots.get_mut(diff_id.as_str()) {
            slot.unsettled = unsettled;
        }
        self.save()
    }

    /// The first gap that is large enough.
    fn gap(&self, len: u64) -> Option<u64> {
        let mut taken: Vec<(u64, u64)> =
            self.slots.values().map(|slot| (slot.start, slot.start + slot.len)).collect();
        taken.sort_unstable();
        let mut start: u64 = 0;
        for (from, to) in taken {
            if from >= start && from - start >= len {
                return Some(start);
            }
            start = start.max(to.checked_next_multiple_of(ALIGNMENT)?);
        }
        (start.checked_add(len)? <= CAPACITY).then_some(start)
    }

    /// Renamed into place, not synced: the machine does not outlive the host's power, and neither need this.
    fn save(&self) -> Result<(), LayersError> {
        let bytes = serde_json::to_vec(&self.slots).map_err(io::Error::other);
        bytes
            .and_then(|bytes| crate::files::replace_unsynced(&self.record, &bytes))
            .map_err(|source| LayersError::Record { path: self.record.clone(), source })
    }

    /// The record's path in a machine's folder.
    pub(crate) fn record_in(folder: &Path) -> PathBuf {
        folder.join("layers.json")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(n: usize) -> DiffId {
        format!("{n:064x}").parse().unwrap()
    }

    fn fresh(folder: &tempfile::TempDir) -> Layers {
        Layers::fresh(Layers::record_in(folder.path())).unwrap()
    }

    #[test]
    fn gaps_are_used_again() {
        let folder = tempfile::tempdir().unwrap();
        let mut layers = fresh(&folder);
        let a = layers.reserve(&id(1), 4096).unwrap();
        let b = layers.reserve(&id(2), 3 * ALIGNMENT).unwrap();
        let c = layers.reserve(&id(3), 4096).unwrap();
        assert_eq!((a.start, b.start, c.start), (0, ALIGNMENT, 4 * ALIGNMENT));
        layers.forget(id(2).as_str()).unwrap();
        let d = layers.reserve(&id(4), 2 * ALIGNMENT).unwrap();
        assert_eq!((d.start, d.number), (ALIGNMENT, 2));
    }

    #[test]
    fn the_256th_layer_is_refused_with_advice() {
        let folder = tempfile::tempdir().unwrap();
        let mut layers = fresh(&folder);
        for n in 0..255 {
            layers.reserve(&id(n), 4096).unwrap();
        }
        assert!(matches!(layers.reserve(&id(255), 4096), Err(LayersError::NoPartition)));
        layers.forget(id(7).as_str()).unwrap();
        assert_eq!(layers.reserve(&id(255), 4096).unwrap().number, 8);
    }

    #[test]
    fn lengths_are_checked() {
        let folder = tempfile::tempdir().unwrap();
        let mut layers = fresh(&folder);
        for bad in [0, 1, 4095, CAPACITY + 4096, u64::MAX] {
            assert!(layers.reserve(&id(1), bad).is_err(), "{bad}");
        }
        layers.reserve(&id(1), CAPACITY).unwrap();
        assert!(matches!(layers.reserve(&id(2), 4096), Err(LayersError::NoSpace(_))));
    }

    #[test]
    fn a_restarted_daemon_finds_the_layers_again() {
        let folder = tempfile::tempdir().unwrap();
        let mut layers = fresh(&folder);
        let slot = layers.reserve(&id(1), 4096).unwrap();
        layers.settle(&id(1)).unwrap();
        layers.reserve(&id(2), 4096).unwrap();
        let again = Layers::load(Layers::record_in(folder.path()));
        assert_eq!(again.get(&id(1)).unwrap().source(), slot.source());
        assert_eq!(again.get(&id(2)), None);
        assert_eq!(again.unsettled().len(), 1);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]

        #[test]
        fn layers_never_overlap(lengths in proptest::collection::vec((1u64..5000, proptest::bool::ANY), 1..60)) {
            let folder = tempfile::tempdir().unwrap();
            let mut layers = fresh(&folder);
            for (n, (pages, remove)) in lengths.iter().enumerate() {
                layers.reserve(&id(n), pages * 4096).unwrap();
                if *remove {
                    layers.forget(id(n / 2).as_str()).unwrap();
                }
                let mut taken: Vec<_> = layers.slots.values().map(|slot| (slot.start, slot.start + slot.len)).collect();
                taken.sort_unstable();
                prop_assert!(taken.windows(2).all(|pair| pair[0].1 <= pair[1].0));
                prop_assert!(taken.iter().all(|(start, _)| start.is_multiple_of(ALIGNMENT)));
            }
        }
    }
}
