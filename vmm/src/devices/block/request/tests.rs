use super::*;
use crate::devices::block::{DataDisk, LayersDisk, Segments};
use std::io::Read;
use std::os::fd::OwnedFd;
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

const WRITABLE: u16 = 2;
const NEXT: u16 = 1;
const HEADER_AT: u64 = 0x4000;
const DATA_AT: u64 = 0x5000;
const STATUS_AT: u64 = 0x4800;

/// One request through a real queue: header, data in two parts, status. Returns status and used length.
fn request<B: Backend>(
    requests: &mut Requests<B>,
    memory: &Memory,
    kind: u32,
    sector: u64,
    data: (usize, bool),
) -> Result<(u8, u32), Broken> {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    memory.write_slice(&header, GuestAddress(HEADER_AT)).unwrap();
    memory.write_slice(&[0xee], GuestAddress(STATUS_AT)).unwrap();
    let (len, device_writes) = data;
    let flags = NEXT | if device_writes { WRITABLE } else { 0 };
    let mut parts = vec![(HEADER_AT, 16, NEXT)];
    if len > 0 {
        parts.push((DATA_AT, 7, flags));
        parts.push((DATA_AT + 7, len as u32 - 7, flags));
    }
    parts.push((STATUS_AT, 1, WRITABLE));
    let descriptors: Vec<_> = parts
        .iter()
        .enumerate()
        .map(|(index, &(address, len, flags))| {
            RawDescriptor::from(Descriptor::new(address, len, flags, index as u16 + 1))
        })
        .collect();
    let mock = MockSplitQueue::new(memory, 16);
    mock.build_desc_chain(&descriptors).unwrap();
    let mut queue: Queue = mock.create_queue().unwrap();
    let chain = queue.iter(memory).unwrap().next().unwrap();
    let mut request = requests.begin(memory, chain)?;
    while let Some(job) = request.jobs.pop_front() {
        if let Err(error) = job.run() {
            request.fail("test", &error);
        }
    }
    let (_, used) = request.finish()?;
    Ok((memory.read_obj(GuestAddress(STATUS_AT)).unwrap(), used))
}

fn memory() -> Memory {
    crate::memory::allocate(&[(GuestAddress(0), 0x20000)]).unwrap()
}

fn data_disk() -> (Requests<DataDisk>, std::fs::File) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let disk = DataDisk::new(OwnedFd::from(file.try_clone().unwrap()), 1 << 20).unwrap();
    (Requests::new(disk), file)
}

#[test]
fn what_is_written_is_read_and_what_is_discarded_is_zero() {
    let (mut requests, file) = data_disk();
    let memory = memory();
    let content: Vec<u8> = (0..1024u32).map(|i| (i % 253) as u8).collect();
    memory.write_slice(&content, GuestAddress(DATA_AT)).unwrap();
    assert_eq!(request(&mut requests, &memory, TYPE_OUT, 8, (1024, false)), Ok((0, 1)));
    memory.write_slice(&[0; 1024], GuestAddress(DATA_AT)).unwrap();
    assert_eq!(request(&mut requests, &memory, TYPE_IN, 8, (1024, true)), Ok((0, 1025)));
    let mut found = vec![0; 1024];
    memory.read_slice(&mut found, GuestAddress(DATA_AT)).unwrap();
    assert_eq!(found, content);
    assert_eq!(request(&mut requests, &memory, TYPE_FLUSH, 0, (0, false)), Ok((0, 1)));

    for kind in [TYPE_DISCARD, TYPE_WRITE_ZEROES] {
        let mut range = [0; 16];
        range[..8].copy_from_slice(&8u64.to_le_bytes());
        range[8..12].copy_from_slice(&2u32.to_le_bytes());
        memory.write_slice(&range, GuestAddress(DATA_AT)).unwrap();
        assert_eq!(request(&mut requests, &memory, kind, 0, (16, false)), Ok((0, 1)));
    }
    let mut all = Vec::new();
    (&file).read_to_end(&mut all).unwrap();
    assert!(all.iter().all(|&byte| byte == 0));
    assert_eq!(all.len(), 1 << 20);
}

#[rstest::rstest]
#[case::beyond_the_end(TYPE_IN, 2047, 1024, 1)]
#[case::far_beyond_the_end(TYPE_OUT, u64::MAX, 512, 1)]
#[case::not_a_sector(TYPE_IN, 0, 511, 1)]
#[case::unknown(99, 0, 512, 2)]
#[case::malformed_discard(TYPE_DISCARD, 0, 15, 2)]
fn a_senseless_request_gets_an_error(
    #[case] kind: u32,
    #[case] sector: u64,
    #[case] len: usize,
    #[case] status: u8,
) {
    let (mut requests, _file) = data_disk();
    assert_eq!(request(&mut requests, &memory(), kind, sector, (len, kind == TYPE_IN)), Ok((status, 1)));
}

#[test]
fn a_disk_that_shrank_gives_an_error_and_not_zeroes() {
    let (mut requests, file) = data_disk();
    file.set_len(512).unwrap();
    assert_eq!(request(&mut requests, &memory(), TYPE_IN, 0, (1024, true)), Ok((1, 1)));
}

#[test]
fn layers_read_from_their_segments_only() {
    let segments = Segments::new(16 << 40).unwrap();
    let mut requests = Requests::new(LayersDisk::new(segments.clone()));
    let memory = memory();
    let offset = 15u64 << 40;
    assert_eq!(request(&mut requests, &memory, TYPE_IN, offset / 512, (1024, true)), Ok((1, 1)));
    let file = tempfile::tempfile().unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; 600], 0).unwrap();
    segments.attach(offset, 4096, file.into()).unwrap();
    assert_eq!(request(&mut requests, &memory, TYPE_IN, offset / 512, (1024, true)), Ok((0, 1025)));
    let mut found = [9; 1024];
    memory.read_slice(&mut found, GuestAddress(DATA_AT)).unwrap();
    assert!(found[..600].iter().all(|&byte| byte == 7) && found[600..].iter().all(|&byte| byte == 0));
    assert_eq!(request(&mut requests, &memory, TYPE_OUT, offset / 512, (1024, false)), Ok((1, 1)));
    segments.detach(offset).unwrap();
    assert_eq!(request(&mut requests, &memory, TYPE_IN, offset / 512, (1024, true)), Ok((1, 1)));
}

#[test]
fn a_request_without_a_place_for_its_status_breaks_the_device() {
    let (requests, _file) = data_disk();
    let memory = memory();
    let mock = MockSplitQueue::new(&memory, 16);
    mock.build_desc_chain(&[RawDescriptor::from(Descriptor::new(HEADER_AT, 16, 0, 0))]).unwrap();
    let mut queue: Queue = mock.create_queue().unwrap();
    let chain = queue.iter(&memory).unwrap().next().unwrap();
    assert_eq!(requests.begin(&memory, chain).unwrap_err(), Broken::Chain);
    assert_eq!(queue.next_avail(), 1);
}

/// How many flushes a write needs to be durable when it is answered.
#[rstest::rstest]
#[case::the_driver_flushes(FEATURE_FLUSH, 1)]
#[case::the_driver_does_not_flush(0, 2)]
fn without_flushes_of_the_driver_a_write_is_durable_when_it_is_done(
    #[case] features: u64,
    #[case] jobs: usize,
) {
    let (mut requests, _file) = data_disk();
    requests.activated(features);
    let memory = memory();
    let data = Buffers::of(vm_memory::GuestMemory::get_slice(&memory, GuestAddress(DATA_AT), 512).unwrap());
    let Plan::Jobs(found) = requests.plan(TYPE_OUT, 0, data, Buffers::default()).unwrap() else {
        panic!("no jobs")
    };
    assert_eq!(found.len(), jobs);
}
