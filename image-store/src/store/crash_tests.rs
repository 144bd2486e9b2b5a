//! `kill -9` before every change on disk, one after the other: whatever was done then, the next start finds the old
//! state or the new, with all files that belong to it and no others.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use coracle_tarball::{Entry, EntryKind, Mtime, TarWriter};
use serde_json::json;

use super::*;
use crate::config::ContainerConfig;
use crate::faults::DIE_AT;

const OPERATION: &str = "CORACLE_TEST_OPERATION";
const STORE: &str = "CORACLE_TEST_CRASHING_STORE";

fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = TarWriter::new(Vec::new());
    for (path, content) in files {
        let entry = Entry {
            path: path.as_bytes().to_vec(),
            link: Vec::new(),
            kind: EntryKind::Regular,
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: Mtime::default(),
            device: (0, 0),
            size: content.len() as u64,
            xattrs: Vec::new(),
            sparse: None,
        };
        tar.append(&entry, *content).unwrap();
    }
    tar.finish().unwrap()
}

/// An archive of one image.
fn archive(tag: &str, layers: &[Vec<u8>]) -> Vec<u8> {
    let diff_ids: Vec<_> = layers.iter().map(|layer| Digest::of(layer).to_string()).collect();
    let rootfs = json!({ "type": "layers", "diff_ids": diff_ids });
    let config = json!({ "os": "linux", "config": { "Cmd": [tag] }, "rootfs": rootfs }).to_string();
    let names: Vec<_> = (0..layers.len()).map(|n| format!("{n}/layer.tar")).collect();
    let manifest = json!([{ "Config": "config.json", "RepoTags": [tag], "Layers": names }]).to_string();
    let mut files: Vec<(&str, &[u8])> =
        vec![("config.json", config.as_bytes()), ("manifest.json", manifest.as_bytes())];
    files.extend(names.iter().map(String::as_str).zip(layers.iter().map(Vec::as_slice)));
    tar(&files)
}

fn layer(name: &str) -> Vec<u8> {
    tar(&[(name, name.as_bytes()), ("big", &name.as_bytes().repeat(2000))])
}

/// What every operation finds.
fn prepare(store: &ImageStore) {
    store.load(archive("old:1", &[layer("base"), layer("old")]).as_slice(), &mut |_| {}).unwrap();
    store.load(archive("other:1", &[layer("base")]).as_slice(), &mut |_| {}).unwrap();
    store.tag("old:1", &"old:2".parse().unwrap()).unwrap();
}

const OPERATIONS: [&str; 9] =
    ["load", "move a tag", "tag", "untag", "delete", "delete a used one", "forget", "import", "commit"];

fn perform(store: &ImageStore, operation: &str) {
    let used = |_: &ImageId| Some(ImageUser { container: "c".to_owned(), is_running: false });
    match operation {
        "load" => {
            let archive = archive("new:1", &[layer("base"), layer("new"), layer("newer")]);
            store.load(archive.as_slice(), &mut |_| {}).unwrap();
        }
        "move a tag" => {
            let archive = archive("old:1", &[layer("new")]);
            store.load(archive.as_slice(), &mut |_| {}).unwrap();
        }
        "tag" => store.tag("other:1", &"old:1".parse().unwrap()).unwrap(),
        "untag" => drop(store.remove("old:2", false, &|_| None).unwrap()),
        "delete" => {
            let id = store.resolve("old:1").unwrap().to_string();
            store.remove(&id, true, &|_| None).unwrap();
        }
        "delete a used one" => {
            let id = store.resolve("old:1").unwrap().to_string();
            store.remove(&id, true, &used).unwrap();
        }
        "forget" => {
            store.remove("other:1", true, &used).unwrap();
            store.forget_removed(&|_| false).unwrap();
        }
        "import" => {
            let tag = Some("imported:1".parse().unwrap());
            store.import(layer("imported").as_slice(), &Import { tag, ..Import::default() }).unwrap();
        }
        "commit" => {
            let commit = Commit {
                parent: store.resolve("old:1").unwrap(),
                config: ContainerConfig::default(),
                changes: Vec::new(),
                tag: Some("old:1".parse().unwrap()),
                author: String::new(),
                comment: String::new(),
                created_by: String::new(),
            };
            store.commit(layer("committed").as_slice(), commit).unwrap();
        }
        other => panic!("no operation {other}"),
    }
}

/// Not a test of its own: the process that dies.
#[test]
fn do_one_thing_and_perhaps_die() {
    let Some(root) = std::env::var_os(STORE) else { return };
    let store = ImageStore::open(Path::new(&root)).unwrap();
    perform(&store, &std::env::var(OPERATION).unwrap());
}

/// Runs the operation in a process that dies at this place; whether it did.
fn dies(root: &Path, operation: &str, place: usize) -> bool {
    let ended = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "store::crash_tests::do_one_thing_and_perhaps_die"])
        .envs([(OPERATION, operation), (DIE_AT, &place.to_string())])
        .env(STORE, root)
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(ended.success() || ended.code().is_none(), "{operation} failed at {place}: {ended}");
    !ended.success()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).unwrap()),
        }
    }
}

/// Names and layers of all images; everything that belongs to them was read, and nothing else is there.
fn state(root: &Path) -> BTreeSet<String> {
    let store = ImageStore::open(root).unwrap();
    let images = store.db.images_and_removed().unwrap();
    let mut expected = BTreeSet::new();
    for (id, record) in &images {
        expected.insert(format!("blobs/sha256/{}", id.digest().hex()));
        for layer in &record.layers {
            let mut tar = store.layer_tar(&layer.diff_id).unwrap();
            std::io::copy(&mut tar, &mut std::io::sink()).unwrap();
            let mut image = Vec::new();
            File::open(store.files.layer_path(&layer.diff_id)).unwrap().read_to_end(&mut image).unwrap();
            assert_eq!(image.len() as u64, layer.size);
            let hex = layer.diff_id.hex();
            expected.extend([format!("layers/{hex}.erofs"), format!("layers/{hex}.recipe")]);
        }
    }
    let mut found = BTreeSet::new();
    for folder in ["tmp", "layers", "blobs/sha256"] {
        let entries = fs::read_dir(root.join(folder)).unwrap();
        found.extend(entries.map(|entry| format!("{folder}/{}", entry.unwrap().file_name().display())));
    }
    assert_eq!(found, expected);
    let names = store.db.names().unwrap();
    let describe = |(id, record): &(ImageId, ImageRecord)| {
        let layers: Vec<_> = record.layers.iter().map(|layer| layer.diff_id.short()).collect();
        // A new image's id depends on when it was made.
        format!("{:?} {layers:?} {}", names.of(id).0, record.removed)
    };
    images.iter().map(describe).collect()
}

#[test]
fn a_process_killed_before_any_change_on_disk_leaves_the_old_state_or_the_new() {
    let work = tempfile::tempdir().unwrap();
    let base = work.path().join("base");
    prepare(&ImageStore::open(&base).unwrap());
    let old = state(&base);
    for operation in OPERATIONS {
        let after = work.path().join("after");
        copy(&base, &after);
        perform(&ImageStore::open(&after).unwrap(), operation);
        let new = state(&after);
        fs::remove_dir_all(&after).unwrap();
        let (mut olds, mut news) = (0, 0);
        for place in 0.. {
            let root = work.path().join("dying");
            copy(&base, &root);
            let died = dies(&root, operation, place);
            let found = state(&root);
            match (found == old, found == new) {
                (true, _) => olds += 1,
                (_, true) => news += 1,
                // Removing and forgetting are two steps.
                _ if operation == "forget" => {}
                _ => panic!("{operation}, killed at {place}: {found:#?}"),
            }
            fs::remove_dir_all(&root).unwrap();
            if !died {
                assert!(found == new, "{operation} was not killed and is not done");
                break;
            }
        }
        // It died on both sides of the moment in which it counts.
        assert!(olds > 3 && news > 1, "{operation}: {olds} times the old state, {news} times the new");
        println!("{operation}: {olds} times the old state, {news} times the new");
    }
}
