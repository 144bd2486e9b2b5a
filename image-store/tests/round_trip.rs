//! Random trees: what goes into a tar stream comes out of the image, in whatever form the stream is packed.
#![allow(missing_docs)]

mod common;

use std::collections::BTreeMap;

use common::{Tar, convert, gzip, make, tree_of};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use tar::EntryType;

#[derive(Debug, Clone)]
enum Kind {
    Directory(BTreeMap<String, Node>),
    File(Vec<u8>),
    Symlink(String),
    Char(u32, u32),
    Fifo,
}

#[derive(Debug, Clone)]
struct Node {
    mode: u16,
    owner: u32,
    mtime: (i64, u32),
    xattrs: BTreeMap<String, Vec<u8>>,
    kind: Kind,
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof![
        8 => "[-a-zA-Z0-9_+~. ]{1,12}",
        1 => "[!-.0-~]{200,255}",
        1 => "[äöü€]{1,40}",
    ]
    .prop_filter("not a name", |name| {
        name != "." && name != ".." && !name.starts_with(".wh.") && !name.starts_with(' ')
    })
}

fn node() -> impl Strategy<Value = Node> {
    let leaf = prop_oneof![
        4 => vec(any::<u8>(), 0..200).prop_map(Kind::File),
        2 => (0usize..9000, 0..2u8).prop_map(|(size, byte)| Kind::File(vec![byte; size])),
        2 => "[!-~]{1,150}".prop_map(Kind::Symlink),
        1 => "[!-~]{3900,4095}".prop_map(Kind::Symlink),
        1 => (1u32..4096, 0u32..1 << 20).prop_map(|(major, minor)| Kind::Char(major, minor)),
        1 => Just(Kind::Fifo),
    ];
    let with_meta = |kind: BoxedStrategy<Kind>| {
        let xattrs = btree_map("(user|trusted|security)\\.[a-z]{1,20}", vec(any::<u8>(), 0..300), 0..3);
        (0u16..0o10000, any::<u32>(), (-1i64 << 40..1i64 << 40, 0u32..1_000_000_000), xattrs, kind)
            .prop_map(|(mode, owner, mtime, xattrs, kind)| Node { mode, owner, mtime, xattrs, kind })
            .boxed()
    };
    with_meta(leaf.boxed()).prop_recursive(5, 60, 25, move |inner| {
        with_meta(btree_map(name(), inner, 0..25).prop_map(Kind::Directory).boxed())
    })
}

fn tree() -> impl Strategy<Value = BTreeMap<String, Node>> {
    btree_map(name(), node(), 0..12)
}

fn write(mut tar: Tar, prefix: &str, children: &BTreeMap<String, Node>) -> Tar {
    for (name, node) in children {
        let path = format!("{prefix}{name}");
        let xattrs: Vec<_> = node
            .xattrs
            .iter()
            .map(|(name, value)| (format!("SCHILY.xattr.{name}"), value.as_slice()))
            .collect();
        let owner = node.owner.to_string();
        let mtime = match node.mtime {
            (seconds, 0) => seconds.to_string(),
            (seconds, nanoseconds) if seconds < 0 => {
                format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - nanoseconds)
            }
            (seconds, nanoseconds) => format!("{seconds}.{nanoseconds:09}"),
        };
        let mut records =
            vec![("uid", owner.as_bytes()), ("gid", owner.as_bytes()), ("mtime", mtime.as_bytes())];
        records.extend(xattrs.iter().map(|(name, value)| (name.as_str(), *value)));
        tar = tar.pax(&records);
        let mode = node.mode.into();
        tar = match &node.kind {
            Kind::Directory(children) => write(tar.dir_with_mode(&path, mode), &format!("{path}/"), children),
            Kind::File(content) => tar.add(Tar::header(EntryType::Regular, mode), &path, content),
            Kind::Symlink(target) => tar.symlink(&path, target),
            Kind::Char(major, minor) => tar.node(EntryType::Char, &path, *major, *minor),
            Kind::Fifo => tar.node(EntryType::Fifo, &path, 0, 0),
        };
    }
    tar
}

fn compare(seen: &BTreeMap<String, common::Seen>, prefix: &str, children: &BTreeMap<String, Node>) -> usize {
    let mut count = 0;
    for (name, node) in children {
        let path = format!("{prefix}{name}");
        let found = &seen[&path];
        assert_eq!((found.uid, found.gid, found.mtime), (node.owner, node.owner, node.mtime), "{path}");
        assert_eq!(found.xattrs, node.xattrs, "{path}");
        count += 1;
        match &node.kind {
            Kind::Directory(children) => {
                assert_eq!(found.mode, 0o040_000 | node.mode);
                count += compare(seen, &format!("{path}/"), children);
            }
            Kind::File(content) => assert_eq!((found.mode, &found.content), (0o100_000 | node.mode, content)),
            Kind::Symlink(target) => assert_eq!((found.mode, found.text()), (0o120_777, target.as_str())),
            Kind::Char(major, minor) => assert_eq!((found.mode, found.device), (0o020_600, (*major, *minor))),
            Kind::Fifo => assert_eq!(found.mode, 0o010_600),
        }
    }
    count
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_random_tree_survives_the_way_through_tar_and_image(tree in tree()) {
        let tar = write(Tar::new(), "", &tree).finish();
        let seen = tree_of(&tar);
        prop_assert_eq!(compare(&seen, "", &tree) + 1, seen.len());
        let (plain, packed) = (make(&tar).unwrap(), make(&gzip(&tar)).unwrap());
        prop_assert_eq!(&plain.image, &packed.image);
        prop_assert_eq!(&plain.recipe, &packed.recipe);
        prop_assert!(packed.tar().unwrap() == tar);
    }

    #[test]
    fn random_bytes_never_panic(bytes in vec(any::<u8>(), 0..4096)) {
        let _ = convert(&bytes);
        let _ = convert(&gzip(&bytes));
    }

    #[test]
    fn damaged_recipes_give_an_error_and_never_other_bytes(
        tree in tree(),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
    ) {
        let tar = write(Tar::new(), "", &tree).finish();
        let mut made = make(&tar).unwrap();
        for (place, byte) in damage {
            let place = place.index(made.recipe.len());
            made.recipe[place] = byte;
        }
        // Damage to what nothing depends on may go unnoticed.
        prop_assert!(made.tar().map_or(true, |again| again == tar));
    }

    #[test]
    fn damaged_images_are_read_without_panic(
        tree in tree(),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..40),
    ) {
        let (_, mut image) = convert(&write(Tar::new(), "", &tree).finish()).unwrap();
        for (place, byte) in damage {
            // The superblock's checksum would hide everything behind it.
            let place = place.index(image.len());
            if !(1024..4096).contains(&place) {
                image[place] = byte;
            }
        }
        read_everything(&image);
    }
}

/// Reads what can be read; errors are fine, panics and endless loops are not.
fn read_everything(image: &[u8]) {
    use coracle_image_store::erofs::reader::ErofsReader;
    let Ok(mut reader) = ErofsReader::open(std::io::Cursor::new(image)) else { return };
    let mut seen = std::collections::BTreeSet::new();
    let mut pending = vec![reader.root()];
    while let Some(nid) = pending.pop() {
        if !seen.insert(nid) {
            continue;
        }
        let Ok(inode) = reader.inode(nid) else { continue };
        let _ = reader.xattrs(&inode);
        let _ = reader.link_target(&inode);
        let _ = reader.read_at(&inode, 0, &mut [0; 10_000]);
        if let Ok(entries) = reader.entries(&inode) {
            pending.extend(entries.into_iter().map(|entry| entry.nid));
        }
    }
}
