//! Layers: EROFS images, each mounted once for all containers that use it. In the VM a layer is a range of the layers disk
//! that becomes a partition; without a VM it is a file. Everything here blocks and is called off the event loop.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use coracle_agent_api::{ApiError, DiffId, ErrorKind, Layer, LayerSource};
use rustix::mount::{MountAttrFlags, UnmountFlags};

use crate::error::{AtStep, Result, conflict, from_io, invalid, not_found};
use crate::{mounts, sys};

const DISK: &str = "/dev/vdb";
const SECTOR: u64 = 512;
/// The kernel's limit of layers in one overlay.
pub(crate) const MAX_LAYERS: usize = 500;

/// The layers that are mounted.
pub(crate) struct Layers {
    directory: PathBuf,
    mounted: Mutex<HashMap<DiffId, Mounted>>,
}

struct Mounted {
    layer: Layer,
    users: usize,
    /// Keeps a loop device alive until the mount holds it.
    _device: Option<OwnedFd>,
}

/// A container's hold on its layers; none of them can be unmounted as long as it exists.
pub(crate) struct LayerUse {
    layers: Arc<Layers>,
    ids: Vec<DiffId>,
}

impl Layers {
    /// Layers are mounted below `directory`.
    pub(crate) fn new(directory: PathBuf) -> Arc<Self> {
        Arc::new(Self { directory, mounted: Mutex::default() })
    }

    fn table(&self) -> MutexGuard<'_, HashMap<DiffId, Mounted>> {
        self.mounted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The layers that are mounted now.
    pub(crate) fn list(&self) -> Vec<Layer> {
        self.table().values().map(|mounted| mounted.layer.clone()).collect()
    }

    /// Mounts what is missing and holds all.
    pub(crate) fn hold(self: &Arc<Self>, layers: &[Layer]) -> Result<LayerUse> {
        let mut held = LayerUse { layers: self.clone(), ids: Vec::with_capacity(layers.len()) };
        for layer in layers {
            let mut table = self.table();
            match table.get_mut(&layer.diff_id) {
                Some(mounted) if mounted.layer.source != layer.source => {
                    return Err(conflict(format!(
                        "layer {} is mounted from another place",
                        layer.diff_id.short()
                    )));
                }
                Some(mounted) => mounted.users += 1,
                None => {
                    let device = self.mount(layer)?;
                    let mounted = Mounted { layer: layer.clone(), users: 1, _device: device };
                    table.insert(layer.diff_id.clone(), mounted);
                }
            }
            held.ids.push(layer.diff_id.clone());
        }
        Ok(held)
    }

    /// Unmounts a layer that no one holds and gives its partition back.
    pub(crate) fn release(&self, id: &DiffId) -> Result<()> {
        let mut table = self.table();
        let Some(mounted) = table.get(id) else {
            return Err(not_found(format!("no layer {} is mounted", id.short())));
        };
        if mounted.users > 0 {
            return Err(conflict(format!("layer {} is in use", id.short())));
        }
        let path = self.path(id);
        rustix::mount::unmount(&path, UnmountFlags::NOFOLLOW)
            .at_kind(ErrorKind::Conflict, format!("unmount layer {}", id.short()))?;
        // From here on it is not mounted, whatever else fails.
        let mounted = table.remove(id);
        let _ = std::fs::remove_dir(path);
        if let Some(LayerSource::Partition { number, .. }) = mounted.map(|mounted| mounted.layer.source) {
            let step = || format!("remove partition {number}");
            let disk = std::fs::File::open(DISK).at_kind(ErrorKind::Internal, step())?;
            sys::delete_partition(disk.as_fd(), number).at_kind(ErrorKind::Internal, step())?;
        }
        Ok(())
    }

    fn path(&self, id: &DiffId) -> PathBuf {
        self.directory.join(id.as_str())
    }

    fn mount(&self, layer: &Layer) -> Result<Option<OwnedFd>> {
        let step = || format!("mount layer {}", layer.diff_id.short());
        let target = self.path(&layer.diff_id);
        std::fs::create_dir_all(&target).at(step())?;
        let (mount, device) = match &layer.source {
            LayerSource::Partition { number, start, len } => {
                let device = partition(*number, *start, *len)?;
                (mount_erofs(&device).at(step())?, None)
            }
            LayerSource::File { path } => mount_file(Path::new(path)).at(step())?,
        };
        let target = crate::child::open_directory(&target).at(step())?;
        mounts::attach(mount, target).at(step())?;
        Ok(device)
    }
}

impl LayerUse {
    /// Where the layers are mounted, highest first. A layer that occurs twice counts where it is highest, because
    /// everything in it wins there.
    pub(crate) fn lower_directories(&self) -> Vec<PathBuf> {
        let mut seen = std::collections::HashSet::new();
        self.ids.iter().rev().filter(|id| seen.insert(*id)).map(|id| self.layers.path(id)).collect()
    }
}

impl Drop for LayerUse {
    fn drop(&mut self) {
        let mut table = self.layers.table();
        for id in &self.ids {
            if let Some(mounted) = table.get_mut(id) {
                mounted.users = mounted.users.saturating_sub(1);
            }
        }
    }
}

fn mount_erofs(device: &str) -> std::io::Result<OwnedFd> {
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV;
    mounts::new("erofs", &[("source", device), ("ro", "")], attributes)
}

/// Mounts an image file: by the file itself, or through a loop device where the kernel or the file system below cannot.
fn mount_file(path: &Path) -> std::io::Result<(OwnedFd, Option<OwnedFd>)> {
    let text = path.to_str().ok_or(std::io::ErrorKind::InvalidInput)?;
    match mount_erofs(text) {
        Err(error) if error.raw_os_error() == Some(libc::ENOTBLK) => {
            let file = std::fs::File::open(path)?;
            let (device, name) = sys::loop_device(file.as_fd())?;
            Ok((mount_erofs(&name)?, Some(device)))
        }
        mount => Ok((mount?, None)),
    }
}

/// Makes the partition if it is not there; the path of its device.
fn partition(number: u8, start: u64, len: u64) -> Result<String> {
    let aligned = start.is_multiple_of(4096) && len.is_multiple_of(4096);
    if number == 0 || len == 0 || !aligned || start.checked_add(len).is_none() {
        return Err(invalid(format!("partition {number} has an illegal place: {len} bytes at {start}")));
    }
    let step = || format!("add partition {number}");
    let disk = std::fs::File::open(DISK).at(step())?;
    match sys::add_partition(disk.as_fd(), number, start, len) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            let there = partition_place(number).at(step())?;
            if there != (start, len) {
                return Err(conflict(format!("partition {number} is taken by another range")));
            }
        }
        Err(error) => return Err(from_io(ErrorKind::StartFailed, step(), &error)),
    }
    Ok(format!("{DISK}{number}"))
}

fn partition_place(number: u8) -> std::io::Result<(u64, u64)> {
    let read = |name: &str| -> std::io::Result<u64> {
        let text = std::fs::read_to_string(format!("/sys/class/block/vdb{number}/{name}"))?;
        let sectors: u64 = text.trim().parse().map_err(std::io::Error::other)?;
        Ok(sectors.saturating_mul(SECTOR))
    };
    Ok((read("start")?, read("size")?))
}

/// Checks what a request says about layers before anything is mounted.
pub(crate) fn check(layers: &[Layer]) -> Result<(), ApiError> {
    if layers.is_empty() || layers.len() > MAX_LAYERS {
        return Err(invalid(format!("a container has 1 to {MAX_LAYERS} layers, not {}", layers.len())));
    }
    for layer in layers {
        if let LayerSource::File { path } = &layer.source
            && (!Path::new(path).is_absolute() || path.contains('\0'))
        {
            return Err(invalid(format!("the layer's path `{path}` is not absolute")));
        }
    }
    Ok(())
}
