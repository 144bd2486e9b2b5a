//! What CPUID tells a guest's processor: what the hypervisor supports, with the topology of our machine (one socket, one
//! thread per core) and without what a container machine has no use for (nested virtualization, performance counters).

use kvm_bindings::kvm_cpuid_entry2;

const INDEX_SIGNIFICANT: u32 = 1;
const ECX_HYPERVISOR: u32 = 1 << 31;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_VMX: u32 = 1 << 5;
const EDX_HYPER_THREADING: u32 = 1 << 28;
const EXTENDED_ECX_SVM: u32 = 1 << 2;
const EAX_ARAT: u32 = 1 << 2;

/// The processor that asks, and what is around it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Topology {
    /// Which processor, from 0 on; also its APIC id.
    pub(crate) index: u32,
    /// How many there are.
    pub(crate) vcpus: u32,
    /// Whether the local APIC's timer has its deadline mode.
    pub(crate) tsc_deadline: bool,
}

/// Adapts the leaves that the hypervisor supports.
pub(crate) fn adapt(supported: &[kvm_cpuid_entry2], topology: Topology) -> Vec<kvm_cpuid_entry2> {
    let highest = supported.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    let mut entries: Vec<_> = supported
        .iter()
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f | 0x8000_0026))
        .map(|entry| adapt_entry(*entry, topology))
        .collect();
    if highest >= 0xb {
        entries.extend(topology_leaves(topology));
    }
    entries
}

/// Whether the kernel can do without a PIT: the timer must not stop when the processor idles, and count in TSC ticks.
pub(crate) fn needs_pit(supported: &[kvm_cpuid_entry2], tsc_deadline: bool) -> bool {
    let always_running = supported.iter().any(|entry| entry.function == 6 && entry.eax & EAX_ARAT != 0);
    !(always_running && tsc_deadline)
}

fn adapt_entry(mut entry: kvm_cpuid_entry2, topology: Topology) -> kvm_cpuid_entry2 {
    let Topology { index, vcpus, tsc_deadline } = topology;
    match entry.function {
        1 => {
            entry.ebx = entry.ebx & 0xffff | vcpus << 16 | index << 24;
            entry.ecx |= ECX_HYPERVISOR;
            entry.ecx &= !(ECX_VMX | ECX_TSC_DEADLINE);
            if tsc_deadline {
                entry.ecx |= ECX_TSC_DEADLINE;
            }
            entry.edx = set(entry.edx, EDX_HYPER_THREADING, vcpus > 1);
        }
        // Intel's caches: the first two levels belong to a core, the others to the socket.
        4 if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { vcpus - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | (vcpus - 1).min(63) << 26;
        }
        // No performance counters.
        0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_0001 => entry.ecx &= !EXTENDED_ECX_SVM,
        0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | core_bits(vcpus) << 12 | (vcpus - 1),
        // AMD's caches.
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { vcpus - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14;
        }
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (index, index & 0xff, 0),
        _ => {}
    }
    entry
}

fn set(value: u32, bit: u32, on: bool) -> u32 {
    if on { value | bit } else { value & !bit }
}

/// Bits of the APIC id that number the core.
fn core_bits(vcpus: u32) -> u32 {
    vcpus.next_power_of_two().trailing_zeros()
}

/// Leaf 0xb: threads of a core, cores of a socket, end.
fn topology_leaves(Topology { index, vcpus, .. }: Topology) -> [kvm_cpuid_entry2; 3] {
    [(0, 0, 1, 1), (1, core_bits(vcpus), vcpus, 2), (2, 0, 0, 0)].map(|(level, shift, count, kind)| {
        kvm_cpuid_entry2 {
            function: 0xb,
            index: level,
            flags: INDEX_SIGNIFICANT,
            eax: shift,
            ebx: count,
            ecx: level | kind << 8,
            edx: index,
            ..Default::default()
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax: 0x123, ..Default::default() }
    }

    #[test]
    fn every_processor_has_its_own_apic_id() {
        let supported = [leaf(0), leaf(1), leaf(0xb), leaf(0x8000_001e)];
        for index in 0..3 {
            let entries = adapt(&supported, Topology { index, vcpus: 3, tsc_deadline: true });
            let find = |function| entries.iter().find(|entry| entry.function == function).unwrap();
            assert_eq!(find(1).ebx >> 24, index);
            assert_eq!(find(1).ebx >> 16 & 0xff, 3);
            assert_eq!(find(0x8000_001e).eax, index);
            let levels: Vec<_> = entries.iter().filter(|entry| entry.function == 0xb).collect();
            assert!(levels.iter().all(|entry| entry.edx == index));
            assert_eq!((levels[1].eax, levels[1].ebx), (2, 3));
        }
    }

    #[test]
    fn nested_virtualization_is_hidden_and_the_hypervisor_is_not() {
        let mut one = leaf(1);
        one.ecx = ECX_VMX;
        let mut extended = leaf(0x8000_0001);
        extended.ecx = EXTENDED_ECX_SVM | 1;
        let entries = adapt(&[one, extended], Topology { index: 0, vcpus: 1, tsc_deadline: false });
        assert_eq!((entries[0].ecx, entries[1].ecx), (ECX_HYPERVISOR, 1));
    }
}
