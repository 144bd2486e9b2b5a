//! virtio-blk (virtio 1.2, section 5.2): the writable data disk and the read-only layers disk, each with a thread of its
//! own. `request` takes requests apart into jobs, `job` is what a job does to a file, `ring` does several at a time where the
//! host has io_uring, and `worker` is the thread.

mod data;
mod job;
mod layers;
mod request;
mod ring;
mod worker;

use std::thread::JoinHandle;

use super::worker::{Command, Commands, SpawnError, spawn};
use super::{Activation, VirtioDevice};
use crate::jail::Role;

pub(crate) use data::DataDisk;
pub(crate) use layers::{LayersDisk, Segments};
use request::{Backend, Requests};
use worker::Way;

const DEVICE_TYPE: u32 = 2;
/// What `Backend` positions and lengths are multiples of.
pub(crate) const SECTOR: u64 = 512;
const FEATURE_SEG_MAX: u64 = 1 << 2;
const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_BLOCK_SIZE: u64 = 1 << 6;
const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_TOPOLOGY: u64 = 1 << 10;
const FEATURE_DISCARD: u64 = 1 << 13;
const FEATURE_WRITE_ZEROES: u64 = 1 << 14;
const SEG_MAX: u32 = 254;
/// A request to discard or to write zeroes covers at most this much: 2 GiB, in at most 32 ranges.
const MAX_CLEAR_SECTORS: u32 = 1 << 22;
const MAX_CLEAR_RANGES: u32 = 32;

/// Why a disk is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskError {
    #[error("a disk's capacity must be a positive multiple of 4096 bytes, not {0}")]
    Capacity(u64),
    #[error("the disk's file has {file} bytes, fewer than its capacity of {capacity}")]
    TooShort { file: u64, capacity: u64 },
    #[error("cannot find out the size of a disk's file")]
    Size(#[source] std::io::Error),
    #[error(
        "a segment from byte {offset} with {len} bytes is not possible: both must be multiples of 4096, within the disk"
    )]
    SegmentBounds { offset: u64, len: u64 },
    #[error("the segment at byte {offset} overlaps another")]
    SegmentOverlap { offset: u64 },
    #[error("there is no segment that begins at byte {offset}")]
    NoSegment { offset: u64 },
}

/// The device as its transport sees it.
pub(crate) struct Block {
    name: &'static str,
    features: u64,
    config: Vec<u8>,
    commands: Commands<()>,
}

impl Block {
    pub(crate) fn new<B: Backend>(backend: B) -> Result<(Self, Commands<()>, JoinHandle<()>), SpawnError> {
        let name = backend.name();
        let mut features = FEATURE_SEG_MAX | FEATURE_BLOCK_SIZE | FEATURE_TOPOLOGY | FEATURE_FLUSH;
        features |= match backend.read_only() {
            true => FEATURE_READ_ONLY,
            false => FEATURE_DISCARD | FEATURE_WRITE_ZEROES,
        };
        let config = config_space(backend.capacity() / SECTOR);
        let (commands, thread) = spawn(name, Role::Disk, move |inbox| {
            worker::run(&inbox, Requests::new(backend), Way::SideBySide)
        })?;
        Ok((Self { name, features, config, commands: commands.clone() }, commands, thread))
    }
}

/// `struct virtio_blk_config`, up to the fields of WRITE_ZEROES.
fn config_space(sectors: u64) -> Vec<u8> {
    let mut config = vec![0; 60];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &sectors.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    // Physical blocks of 2^3 sectors.
    put(24, &[3]);
    put(34, &1u16.to_le_bytes());
    put(36, &MAX_CLEAR_SECTORS.to_le_bytes());
    put(40, &MAX_CLEAR_RANGES.to_le_bytes());
    // Discards should be aligned to 8 sectors.
    put(44, &8u32.to_le_bytes());
    put(48, &MAX_CLEAR_SECTORS.to_le_bytes());
    put(52, &MAX_CLEAR_RANGES.to_le_bytes());
    put(56, &[1]);
    config
}

/// Serves what is in the rings, without a thread; true if that broke the device.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn serve_data_once(activation: Activation, file: std::os::fd::OwnedFd, capacity: u64) -> bool {
    DataDisk::new(file, capacity).is_ok_and(|disk| worker::serve_once(activation, &Requests::new(disk)))
}

/// The same for a layers disk with one segment.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn serve_layers_once(activation: Activation, file: std::os::fd::OwnedFd, len: u64) -> bool {
    let segments = Segments::new(1 << 40);
    segments.is_ok_and(|segments| {
        segments.attach(4096, len, file).is_ok()
            && worker::serve_once(activation, &Requests::new(LayersDisk::new(segments)))
    })
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn name(&self) -> &'static str {
        self.name
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[256]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) {
        self.commands.send(Command::Activate(activation));
    }

    fn reset(&mut self) {
        self.commands.reset();
    }
}
