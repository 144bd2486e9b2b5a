//! Any bytes as an archive: a load must succeed or fail, and when it fails, leave no files behind.
#![no_main]

use std::fs;

use coracle_image_store::ImageStore;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|archive: &[u8]| {
    let root = tempfile::tempdir().expect("a temporary directory");
    let store = ImageStore::open(root.path()).expect("an empty store opens");
    let loaded = store.load(archive, &mut |_| {});
    let files = |name: &str| fs::read_dir(root.path().join(name)).expect("it is a directory").count();
    assert_eq!(files("tmp"), 0);
    match loaded {
        Ok(images) => images.iter().for_each(|image| drop(store.image(&image.id).expect("it is there"))),
        Err(_) => assert_eq!(files("layers") + files("blobs/sha256"), 0),
    }
});
