//! Layers: what a tar stream says is what the image holds, and bad streams are refused.
#![allow(missing_docs)]

mod common;

use common::{Tar, chain, convert, gzip, make, refusal, tree_of, zstd};
use coracle_image_store::{Digest, LayerError};
use tar::EntryType;

#[test]
fn a_layer_with_all_kinds_of_files_becomes_an_image_of_them() {
    let mut owned = Tar::header(EntryType::Regular, 0o4755);
    owned.set_uid(3_000_000_000);
    owned.set_gid(70_000);
    let tree = tree_of(
        &Tar::new()
            .dir_with_mode("./", 0o711)
            .dir_with_mode("tmp/", 0o1777)
            .add(owned, "bin/su", b"elf")
            .hard_link("bin/sudo", "./bin/su")
            .symlink("sh", "/bin/su")
            .node(EntryType::Char, "dev/null", 1, 3)
            .node(EntryType::Block, "dev/nvme", 259, 70_000)
            .node(EntryType::Fifo, "run/fifo", 0, 0)
            .file("empty", b"")
            .file("big", &vec![7; 10_000])
            .finish(),
    );
    assert_eq!(tree[""].mode, 0o040_711);
    assert_eq!(tree[""].links, 2 + 4);
    assert_eq!(tree["tmp"].mode, 0o041_777);
    assert_eq!((tree["bin"].mode, tree["bin"].uid, tree["bin"].mtime), (0o040_755, 0, (0, 0)));
    let su = &tree["bin/su"];
    assert_eq!((su.mode, su.uid, su.gid, su.links), (0o104_755, 3_000_000_000, 70_000, 2));
    assert_eq!((su.text(), su.mtime), ("elf", (1_600_000_000, 0)));
    assert_eq!(su, &tree["bin/sudo"]);
    assert_eq!((tree["sh"].mode, tree["sh"].text()), (0o120_777, "/bin/su"));
    assert_eq!((tree["dev/null"].mode, tree["dev/null"].device), (0o020_600, (1, 3)));
    assert_eq!((tree["dev/nvme"].mode, tree["dev/nvme"].device), (0o060_600, (259, 70_000)));
    assert_eq!(tree["run/fifo"].mode, 0o010_600);
    assert!(tree["empty"].content.is_empty());
    assert_eq!(tree["big"].content, vec![7; 10_000]);
}

#[test]
fn extended_headers_bring_attributes_nanoseconds_and_long_names() {
    let long_name = "n".repeat(255);
    let long_path = format!("{}{long_name}", "directory/".repeat(200));
    let long_target = "t/".repeat(2047);
    let capability = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let tree = tree_of(
        &Tar::new()
            .pax(&[
                ("SCHILY.xattr.user.comment", b"a=b\nc"),
                ("SCHILY.xattr.security.capability", capability),
                ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
                ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
                ("SCHILY.xattr.trusted.mine", b""),
                ("SCHILY.xattr.system.posix_acl_default", b"\x02\0\0\0"),
                ("SCHILY.xattr.com.apple.quarantine", b"x"),
                ("mtime", b"-1.25"),
                ("uid", b"4000000000"),
            ])
            .dir("attributed")
            .file(&long_path, b"deep")
            .symlink("link", &long_target)
            .pax(&[("path", b"p\xc3\xa4x"), ("linkpath", b"elsewhere")])
            .symlink("short", "here")
            .finish(),
    );
    let attributed = &tree["attributed"];
    let names: Vec<_> = attributed.xattrs.keys().map(String::as_str).collect();
    assert_eq!(names, ["security.capability", "system.posix_acl_default", "trusted.mine", "user.comment"]);
    assert_eq!(attributed.xattrs["user.comment"], b"a=b\nc");
    assert_eq!(attributed.xattrs["security.capability"], capability);
    assert_eq!((attributed.mtime, attributed.uid), ((-2, 750_000_000), 4_000_000_000));
    assert_eq!(tree[&long_path].text(), "deep");
    assert_eq!(tree["link"].text(), long_target);
    assert_eq!(tree["päx"].text(), "elsewhere");
}

#[test]
fn the_last_entry_of_a_name_wins_and_directories_merge() {
    let tree = tree_of(
        &Tar::new()
            .file("a", b"old")
            .hard_link("b", "a")
            .file("a", b"new")
            .dir("d")
            .file("d/kept", b"1")
            .dir_with_mode("d/", 0o700)
            .dir("gone")
            .file("gone/deep/file", b"2")
            .file("gone", b"a file now")
            .file("was-file", b"3")
            .dir("was-file")
            .hard_link("a", "a")
            .finish(),
    );
    assert_eq!((tree["a"].text(), tree["a"].links), ("new", 1));
    assert_eq!((tree["b"].text(), tree["b"].links), ("old", 1));
    assert_eq!(tree["d"].mode, 0o040_700);
    assert!(tree.contains_key("d/kept"));
    assert_eq!(tree["gone"].text(), "a file now");
    assert!(!tree.contains_key("gone/deep"));
    assert_eq!(tree["was-file"].mode, 0o040_755);
}

#[test]
fn whiteouts_become_what_overlay_understands() {
    let tree = tree_of(
        &Tar::new()
            .file("etc/.wh.passwd", b"")
            .file("srv/.wh..wh..opq", b"")
            .file("srv/new", b"1")
            .file("kept/file", b"2")
            .file(".wh.kept", b"")
            .file(".wh.again", b"")
            .file("again/file", b"3")
            .dir(".wh..wh.plnk/")
            .file(".wh..wh.plnk/1.2", b"4")
            .file(".wh..wh.aufs", b"5")
            .finish(),
    );
    assert!(tree["etc/passwd"].is_whiteout());
    assert_eq!(tree["etc"].xattrs["trusted.overlay.origin"], b"");
    assert!(!tree["etc"].is_opaque());
    assert!(tree["srv"].is_opaque());
    assert!(!tree["srv"].xattrs.contains_key("trusted.overlay.origin"));
    // A whiteout concerns lower layers only, before or after an entry of the same name.
    assert!(tree["kept"].is_opaque() && tree.contains_key("kept/file"));
    assert!(tree["again"].is_opaque() && tree.contains_key("again/file"));
    assert!(tree.keys().all(|path| !path.contains(".wh.")));
    assert_eq!(tree.len(), 1 + 8);
}

#[test]
fn absolute_paths_are_relative_to_the_root() {
    let tree = tree_of(&Tar::new().file("/etc/x", b"1").hard_link("/y", "/etc/x").finish());
    assert_eq!((tree["etc/x"].text(), tree["y"].links), ("1", 2));
}

#[test]
fn entries_that_do_not_belong_into_a_layer_are_refused_by_name() {
    for (tar, expected) in [
        (Tar::new().file("../evil", b""), "entry `../evil` is refused: its path contains `..`"),
        (Tar::new().file("a/../../evil", b""), "its path contains `..`"),
        (Tar::new().file("", b""), "its path is empty"),
        (Tar::new().file("./", b"x"), "replace the layer's root"),
        (Tar::new().file(&"x".repeat(256), b""), "longer than 255 bytes"),
        (Tar::new().file(&"x/".repeat(2049), b""), "longer than 4095 bytes"),
        (
            Tar::new().symlink("a", "/etc").file("a/b", b""),
            "its parent `a` is a symbolic link in the same layer",
        ),
        (Tar::new().file("a", b"").file("a/b/c", b""), "its parent `a` is not a directory"),
        (Tar::new().hard_link("a", "nowhere"), "hard link target is not in the layer (target `nowhere`)"),
        (
            Tar::new().hard_link("a", "../../etc/passwd"),
            "its hard link target is bad: its path contains `..`",
        ),
        (Tar::new().dir("d").hard_link("a", "d"), "its hard link target is a directory"),
        (Tar::new().file(".wh.x", b"").hard_link("a", "x"), "hard link target is not in the layer"),
        (Tar::new().symlink("a", ""), "has no target"),
        (Tar::new().file("a/.wh.", b""), "whiteout of no name"),
        (Tar::new().file("a/.wh...", b""), "whiteout of no name"),
        (Tar::new().file("a/.wh.b/c", b""), "beneath a whiteout"),
        (Tar::new().node(EntryType::Char, "a", 5000, 0), "device number 5000:0 is out of range"),
        (Tar::new().add(Tar::header(EntryType::new(b'V'), 0), "label", b""), "type `V` is not supported"),
        (Tar::new().pax(&[("path", b"a\0b")]).file("x", b""), "NUL byte"),
        (Tar::new().pax(&[("uid", b"4294967296")]).file("x", b""), "user id is not a 32-bit number"),
        (Tar::new().pax(&[("size", b"99999999999999")]).file("x", b""), "layer is too large"),
    ] {
        let refusal = refusal(&tar.finish());
        assert!(refusal.contains(expected), "{refusal:?} should contain {expected:?}");
    }
}

#[test]
fn directories_of_all_sizes_can_be_searched_and_listed() {
    for count in [0, 1, 100, 127, 128, 129, 300, 5000] {
        let tar = (0..count).fold(Tar::new().dir("d"), |tar, n| tar.file(&format!("d/-file-{n:020}"), b""));
        let tree = tree_of(&tar.finish());
        assert_eq!(tree.len(), 2 + count);
    }
}

#[test]
fn attributes_that_do_not_fit_are_refused() {
    let value = vec![b'v'; 65_536];
    let refusal_of = |records: &[(&str, &[u8])]| refusal(&Tar::new().pax(records).file("x", b"").finish());
    assert!(refusal_of(&[("SCHILY.xattr.user.a", &value)]).contains("longer than 65535"));
    let name = format!("SCHILY.xattr.user.{}", "n".repeat(251));
    assert!(refusal_of(&[(&name, b"")]).contains("longer than 255"));
    let many: Vec<_> = (0..5).map(|n| (format!("SCHILY.xattr.user.{n}"), &value[1..])).collect();
    let many: Vec<_> = many.iter().map(|(name, value)| (name.as_str(), *value)).collect();
    assert!(refusal_of(&many).contains("do not fit"));
    // Attributes that fill blocks of their own, with inline data behind them.
    let tree = tree_of(&Tar::new().pax(&many[..3]).symlink("x", "target").file("y", b"1").finish());
    assert_eq!((tree["x"].xattrs.len(), tree["x"].text(), tree["y"].text()), (3, "target", "1"));
}

#[test]
fn equal_layers_give_equal_images_whatever_they_are_packed_in() {
    let tar = Tar::new().file("a", b"1").dir("b").symlink("c", "a").finish();
    let (plain, image) = convert(&tar).unwrap();
    assert_eq!(plain.diff_id, Digest::of(&tar));
    for packed in [gzip(&tar), zstd(&tar), [gzip(&tar[..700]), gzip(&tar[700..])].concat()] {
        let (converted, again) = convert(&packed).unwrap();
        assert_eq!(converted.diff_id, plain.diff_id);
        assert_eq!((converted.blob, converted.blob_size), (Digest::of(&packed), packed.len() as u64));
        assert_eq!(again, image);
    }
}

#[test]
fn the_diff_id_covers_what_follows_the_end_mark() {
    let tar = [Tar::new().file("a", b"1").finish(), vec![0; 8192], b"junk".to_vec()].concat();
    assert_eq!(convert(&tar).unwrap().0.diff_id, Digest::of(&tar));
    assert_eq!(convert(&gzip(&tar)).unwrap().0.diff_id, Digest::of(&tar));
}

#[test]
fn the_tar_stream_comes_back_byte_for_byte() {
    let ignored = vec![b'i'; 200_000];
    let tar = Tar::new()
        .dir("d")
        .pax(&[("SCHILY.xattr.user.a", b"1"), ("mtime", b"1.5"), ("comment", b"nobody reads this")])
        .file("short", b"behind its inode")
        .file("one-block", &[1; 4096])
        .file("blocks-and-end", &[2; 9000])
        .file("block-for-the-end", &[3; 7000])
        .file("twin", &[2; 9000])
        .file("replaced", b"lost")
        .file("replaced", &[4; 5000])
        .file("replaced", b"kept")
        .file("replaced-later", &[5; 100])
        .dir("replaced-later")
        .file(".wh.gone", &ignored)
        .file(".wh..wh.plnk", &ignored)
        .hard_link("link", "short")
        .symlink("symlink", "short")
        .finish();
    let tar = [tar, vec![0; 3000], b"junk behind the end mark".to_vec()].concat();
    let made = make(&gzip(&tar)).unwrap();
    assert!(made.tar().unwrap() == tar);
    assert!(made.recipe.len() < 1000, "{} bytes", made.recipe.len());

    let mut damaged = make(&tar).unwrap();
    let place = damaged.image.windows(4).position(|bytes| bytes == [3; 4]).unwrap();
    damaged.image[place] ^= 1;
    assert_eq!(damaged.tar().unwrap_err().kind(), std::io::ErrorKind::InvalidData);
    let mut cut = make(&tar).unwrap();
    cut.recipe.pop();
    assert!(cut.tar().is_err());
}

#[test]
fn files_of_equal_content_share_their_blocks_and_short_ones_need_none() {
    let content: Vec<u8> = (0..500_000u32).map(|n| (n % 7919 * (n % 251)) as u8).collect();
    let size = |tar: Tar| make(&tar.finish()).unwrap().image.len();
    let one = size(Tar::new().file("a", &content));
    let many = (0..50).fold(Tar::new(), |tar, n| tar.file(&format!("{n}"), &content));
    let tree = tree_of(&many.finish());
    assert!(tree.values().filter(|seen| !seen.content.is_empty()).all(|seen| seen.content == content));
    let many = (0..50).fold(Tar::new(), |tar, n| tar.file(&format!("{n}"), &content));
    assert!(size(many) <= one + 50 * 400, "only the ends behind the inodes are there fifty times");
    // One byte makes the difference, and what comes after a shared file is not disturbed by it.
    let mut other = content.clone();
    other[400_000] ^= 1;
    let tar = Tar::new().file("a", &content).file("b", &content).file("c", &other).file("d", &other);
    let tree = tree_of(&tar.finish());
    assert!(tree["b"].content == content && tree["c"].content == other && tree["d"].content == other);

    let short =
        (0..1000).fold(Tar::new(), |tar, n| tar.file(&format!("{n}"), format!("{n:0100}").as_bytes()));
    assert!(size(short) < 1000 * 250, "a block each would be four million bytes");
}

#[test]
fn holes_behind_shared_content_are_holes() {
    let content = vec![0xaa; 300_000];
    let mut sparse = Tar::header(EntryType::GNUSparse, 0o644);
    {
        let gnu = sparse.as_gnu_mut().unwrap();
        gnu.set_real_size(400_000);
        gnu.sparse[0].set_offset(200_000);
        gnu.sparse[0].set_length(3);
    }
    let tar = Tar::new().file("a", &content).file("b", &content).add(sparse, "sparse", b"end").finish();
    let tree = tree_of(&tar);
    let mut expected = vec![0; 400_000];
    expected[200_000..200_003].copy_from_slice(b"end");
    assert!(tree["sparse"].content == expected);
    assert!(make(&tar).unwrap().tar().unwrap() == tar);
}

#[test]
fn what_is_no_layer_is_refused() {
    for blob in [&b""[..], b"hello", &[b'x'; 5000], &gzip(b"hello"), &zstd(&[b'x'; 5000])] {
        let error = convert(blob).unwrap_err();
        assert!(matches!(error, LayerError::Unrecognised), "{error:?}");
        assert_eq!(chain(&error), "layer is not a tar, gzip or zstd stream");
    }
}

#[test]
fn layers_cut_anywhere_inside_are_refused() {
    let tar = Tar::new().file("a", &vec![1; 3000]).file("b", b"2").finish();
    let packed = [gzip(&tar), zstd(&tar)];
    for blob in &packed {
        for length in 0..blob.len() {
            assert!(convert(&blob[..length]).is_err(), "{length} of {}", blob.len());
        }
    }
    // A tar stream may end between entries and inside the padding of the last one, as Go's reader allows and umoci writes them; the digest tells
    // whether it should have.
    let complete = [3512..=3584, 4097..=4608];
    for length in 1..4608 {
        let may_end = complete.iter().any(|range| range.contains(&length));
        assert_eq!(convert(&tar[..length]).is_ok(), may_end, "{length}");
    }
}

#[test]
fn corrupted_streams_never_panic() {
    let tar = Tar::new()
        .pax(&[("SCHILY.xattr.user.a", b"1"), ("mtime", b"1.5")])
        .file("a", b"1")
        .hard_link("b", "a")
        .symlink("c", "a")
        .file("d/e", b"2")
        .finish();
    for position in 0..tar.len() {
        for flip in [1, 0x80, 0xff] {
            let mut bad = tar.clone();
            bad[position] ^= flip;
            let _ = convert(&bad);
        }
    }
    let packed = gzip(&tar);
    for position in 0..packed.len() {
        let mut bad = packed.clone();
        bad[position] ^= 0x40;
        let _ = convert(&bad);
    }
}

#[test]
fn extended_headers_that_would_eat_memory_are_refused() {
    let mut header = Tar::header(EntryType::XHeader, 0);
    header.set_size(1 << 40);
    header.set_cksum();
    assert!(refusal(&[&header.as_bytes()[..], &[0; 4096]].concat()).contains("an extended header of"));
}
