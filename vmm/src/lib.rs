//! The virtual machine monitor: a machine with virtio devices, controlled over one socket, with every resource handed
//! in as a descriptor. It knows nothing of containers. Nothing outside `hypervisor/kvm` and `arch` knows KVM.

pub mod control;
pub mod probe;
