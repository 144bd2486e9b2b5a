//! What the VMM's front end asks for: features, memory, rings. Once the connection is over, the rings stop.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryMmap, GuestRegionMmap};

use super::ledger::Ledger;
use super::requests::Requests;
use super::ring::Ring;
use super::{MAX_QUEUE_SIZE, MAX_QUEUES, Memory};

/// VIRTIO 1.3 §6: `VIRTIO_F_VERSION_1`.
const VERSION_1: u64 = 1 << 32;
/// VIRTIO 1.3 §6: `VIRTIO_F_INDIRECT_DESC`.
const INDIRECT_DESCRIPTORS: u64 = 1 << 28;
/// VIRTIO 1.3 §6: `VIRTIO_F_EVENT_IDX`.
const EVENT_INDEX: u64 = 1 << 29;
/// The most regions of memory.
const MAX_REGIONS: usize = 32;

/// Where a region is in the VMM's address space.
struct Mapping {
    frontend: u64,
    len: u64,
    guest: u64,
}

pub(super) struct Frontend {
    memory: Memory,
    mappings: Vec<Mapping>,
    rings: Vec<Ring>,
    features: u64,
}

impl Frontend {
    pub(super) fn new(requests: Arc<Requests>) -> Self {
        let memory = Memory::new(GuestMemoryMmap::new());
        let rings = (0..MAX_QUEUES).map(|_| Ring::new(memory.clone(), Arc::clone(&requests))).collect();
        Self { memory, mappings: Vec::new(), rings, features: 0 }
    }

    fn ring(&mut self, index: impl Into<u32>) -> Result<&mut Ring> {
        self.rings.get_mut(index.into() as usize).ok_or(Error::InvalidParam)
    }

    fn guest_address(&self, address: u64) -> Result<GuestAddress> {
        self.mappings
            .iter()
            .find_map(|mapping| {
                let offset = address.checked_sub(mapping.frontend).filter(|offset| *offset < mapping.len)?;
                mapping.guest.checked_add(offset)
            })
            .map(GuestAddress)
            .ok_or(Error::InvalidParam)
    }

    fn protocol_features() -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
    }

    fn map(region: &VhostUserMemoryRegion, file: File) -> Result<(GuestRegionMmap, Mapping)> {
        let mapped = region.mmap_region(file)?;
        let mapped =
            GuestRegionMmap::new(mapped, GuestAddress(region.guest_phys_addr)).ok_or(Error::InvalidParam)?;
        let mapping =
            Mapping { frontend: region.user_addr, len: region.memory_size, guest: region.guest_phys_addr };
        Ok((mapped, mapping))
    }

    fn replace_memory(&self, memory: GuestMemoryMmap) {
        self.memory.lock().unwrap_or_else(std::sync::PoisonError::into_inner).replace(memory);
    }
}

fn refused(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::ReqHandlerError(io::Error::other(error))
}

fn unsupported<T>() -> Result<T> {
    Err(Error::InvalidOperation("the file server does not support it"))
}

impl VhostUserBackendReqHandlerMut for Frontend {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.rings.iter_mut().for_each(Ring::reset);
        self.features = 0;
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(VERSION_1 | INDIRECT_DESCRIPTORS | EVENT_INDEX | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.get_features()? != 0 {
            return Err(Error::InvalidParam);
        }
        self.features = features;
        let without_enabling = features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0;
        for ring in &mut self.rings {
            ring.configure(|queue| queue.set_event_idx(features & EVENT_INDEX != 0));
            if without_enabling {
                ring.enable(true)?;
            }
        }
        Ok(())
    }

    fn set_mem_table(&mut self, regions: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<()> {
        if regions.len() != files.len() || regions.len() > MAX_REGIONS {
            return Err(Error::InvalidParam);
        }
        let mapped = regions
            .iter()
            .zip(files)
            .map(|(region, file)| Self::map(region, file))
            .collect::<Result<Vec<_>>>()?;
        let (mapped, mappings): (Vec<_>, Vec<_>) = mapped.into_iter().unzip();
        self.replace_memory(GuestMemoryMmap::from_regions(mapped).map_err(refused)?);
        self.mappings = mappings;
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(&mut self, region: &VhostUserSingleMemoryRegion, file: File) -> Result<()> {
        if self.mappings.len() >= MAX_REGIONS {
            return Err(Error::InvalidParam);
        }
        let (mapped, mapping) = Self::map(region, file)?;
        let memory = self.memory.memory().insert_region(Arc::new(mapped)).map_err(refused)?;
        self.replace_memory(memory);
        self.mappings.push(mapping);
        Ok(())
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let address = GuestAddress(region.guest_phys_addr);
        let (memory, _) = self.memory.memory().remove_region(address, region.memory_size).map_err(refused)?;
        self.replace_memory(memory);
        self.mappings.retain(|mapping| mapping.guest != region.guest_phys_addr);
        Ok(())
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).ok().filter(|size| size.is_power_of_two() && *size <= MAX_QUEUE_SIZE);
        let size = size.ok_or(Error::InvalidParam)?;
        self.ring(index)?.configure(|queue| queue.set_size(size));
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _: u64,
    ) -> Result<()> {
        let descriptors = self.guest_address(descriptors)?;
        let available = self.guest_address(available)?;
        let used = self.guest_address(used)?;
        let memory = self.memory.memory();
        self.ring(index)?.configure(|queue| {
            queue.try_set_desc_table_address(descriptors).map_err(refused)?;
            queue.try_set_avail_ring_address(available).map_err(refused)?;
            queue.try_set_used_ring_address(used).map_err(refused)?;
            // A ring that was used before goes on where it was.
            let next = queue.used_idx(&*memory, std::sync::atomic::Ordering::Acquire).map_err(refused)?;
            queue.set_next_used(next.0);
            Ok(())
        })
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.ring(index)?.configure(|queue| queue.set_next_avail(base));
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let ring = self.ring(index)?;
        ring.stop();
        let next = ring.configure(|queue| queue.next_avail());
        Ok(VhostUserVringState::new(index, next.into()))
    }

    fn set_vring_kick(&mut self, index: u8, kick: Option<File>) -> Result<()> {
        let kick = kick.ok_or(Error::InvalidOperation("rings are not polled"))?;
        self.ring(index)?.start(OwnedFd::from(kick)).map_err(Error::ReqHandlerError)
    }

    fn set_vring_call(&mut self, index: u8, call: Option<File>) -> Result<()> {
        self.ring(index)?.set_call(call.map(OwnedFd::from));
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, complaints: Option<File>) -> Result<()> {
        self.ring(index)?.set_complaints(complaints.map(OwnedFd::from));
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(Self::protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        if features & !Self::protocol_features().bits() == 0 { Ok(()) } else { Err(Error::InvalidParam) }
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(MAX_QUEUES)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        if self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            return Err(Error::InactiveFeature(VhostUserVirtioFeatures::PROTOCOL_FEATURES));
        }
        self.ring(index)?.enable(enable)
    }

    fn get_config(&mut self, _: u32, _: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        unsupported()
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        unsupported()
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        unsupported()
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        unsupported()
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        unsupported()
    }

    /// The memory must be new: there is nothing that an earlier server left.
    fn set_inflight_fd(&mut self, request: &VhostUserInflight, file: File) -> Result<()> {
        let mut ledgers = Ledger::open(request, file)?.into_iter();
        for ring in &mut self.rings {
            ring.set_ledger(ledgers.next());
        }
        Ok(())
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        unsupported()
    }

    fn check_device_state(&mut self) -> Result<()> {
        unsupported()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unsupported()
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        unsupported()
    }
}
