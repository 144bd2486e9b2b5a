//! A story told by bytes: what a guest and the host's streams do to the core, in any order. The core is watched all the while: no
//! more may be under way than the guest said it can hold, and no more buffered than was promised to it.

use std::collections::HashMap;

use super::*;

/// What the guest was told and told itself of one connection.
#[derive(Default)]
struct Watched {
    sent: u64,
    consumed: u64,
    /// Payload that the core took and that was not written yet.
    buffered: u32,
}

/// Tells the story.
pub(crate) fn fuzz(story: &[u8]) {
    let mut core = Core::new(3);
    core.listen(1);
    core.listen(2);
    let mut watched: HashMap<Id, Watched> = HashMap::new();
    let mut ids: Vec<Id> = Vec::new();
    for step in story.chunks_exact(8) {
        let [kind, which, ..] = *step else { continue };
        let number = u32::from_le_bytes([step[4], step[5], step[6], step[7]]);
        let id = ids.get(usize::from(which) % ids.len().max(1)).copied();
        match (kind % 8, id) {
            (0, _) if ids.len() < 64 => {
                let from = (which >= 128).then_some(u32::from(which));
                ids.extend(core.connect(u32::from(which % 4), from));
            }
            (1, Some(id)) => core.host_readable(id),
            (2, Some(id)) => core.host_gone(id),
            (3, Some(id)) => {
                let known = watched.entry(id).or_default();
                let len = number.min(known.buffered);
                known.buffered -= len;
                core.delivered(id, len);
            }
            (4, _) => take_packets(&mut core, &mut watched, which),
            (5, _) if which % 16 == 0 => {
                core.device_reset();
                watched.clear();
            }
            _ => guest_speaks(&mut core, &mut watched, step, number),
        }
        while let Some(action) = core.next_action() {
            match action {
                Action::Accept(id, _) if which % 5 == 0 => core.refuse(id),
                Action::Accept(id, _) => {
                    ids.push(id);
                    core.accepted(id);
                }
                Action::Close(id) | Action::Abort(id) => drop(watched.remove(&id)),
                Action::ShutdownRead(_) | Action::ShutdownWrite(_) => {}
            }
        }
    }
    core.device_reset();
    for id in ids {
        core.host_gone(id);
    }
    assert!(!core.connections.values().any(|connection| !connection.is_unannounced()));
}

/// A packet whose numbers are often those that would be right.
fn guest_speaks(core: &mut Core, watched: &mut HashMap<Id, Watched>, step: &[u8], number: u32) {
    let host = match step[2] % 4 {
        port @ 0..3 => u32::from(port),
        _ => FIRST_EPHEMERAL + u32::from(step[2] >> 4),
    };
    let ports = Ports { host, guest: u32::from(step[1] % 4) };
    let id = core.by_ports.get(&ports).copied();
    let known = id.and_then(|id| watched.get(&id));
    let honest = known.map_or(0, |known| known.sent as u32);
    let header = Header {
        src_cid: 3,
        dst_cid: HOST_CID,
        src_port: ports.guest,
        dst_port: ports.host,
        len: number % 100_000,
        kind: TYPE_STREAM,
        operation: u16::from(step[3] % 9),
        flags: number & 3,
        buf_alloc: if step[3] & 0x80 == 0 { 65536 } else { number },
        fwd_cnt: if step[3] & 0x40 == 0 { honest } else { number },
    };
    let taken = core.guest_packet(&header);
    if let Some(id) = taken {
        let known = watched.entry(id).or_default();
        known.buffered += header.len;
        assert!(known.buffered <= BUFFER, "more is buffered than was promised");
    }
    // A claim that was believed holds from here on.
    if let Some(id) = id
        && core.by_ports.get(&ports) == Some(&id)
    {
        let known = watched.entry(id).or_default();
        let newly = u64::from(header.fwd_cnt.wrapping_sub(known.consumed as u32));
        if newly <= known.sent - known.consumed {
            known.consumed += newly;
        }
    }
}

fn take_packets(core: &mut Core, watched: &mut HashMap<Id, Watched>, which: u8) {
    for _ in 0..which % 8 {
        match core.next_packet() {
            None => return,
            Some(Outgoing::Control(_)) => {}
            Some(Outgoing::Data(id, room)) => {
                assert!(room.bytes > 0 && room.packets > 0);
                let len = room.bytes.min(u32::from(which) * 50 + 1);
                let result = match which % 7 {
                    0 => ReadResult::WouldBlock,
                    1 => ReadResult::EndOfFile,
                    2 => ReadResult::Failed,
                    _ => ReadResult::Bytes(len),
                };
                let sent = core.read_done(id, result);
                assert_eq!(sent.is_some(), matches!(result, ReadResult::Bytes(_)));
                if sent.is_some() {
                    let known = watched.entry(id).or_default();
                    known.sent += u64::from(len);
                    assert!(known.sent - known.consumed <= 4 << 20, "too much is under way");
                }
            }
        }
    }
}
