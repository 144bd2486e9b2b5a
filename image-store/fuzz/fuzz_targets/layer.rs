//! Any bytes as a layer: conversion must end in an error, or in an image that reads back without error and in a recipe
//! that gives the stream back.
#![no_main]

use std::collections::BTreeSet;
use std::io::Cursor;

use coracle_image_store::{LayerTar, convert_layer};
use coracle_image_store::erofs::reader::ErofsReader;
use libfuzzer_sys::fuzz_target;

/// Holes make images much larger than their layers.
const MAX_IMAGE: u64 = 16 << 20;

fuzz_target!(|blob: &[u8]| {
    let mut blob = blob.to_vec();
    blob.chunks_exact_mut(512).for_each(correct_checksum);
    let mut image = Cursor::new(Vec::new());
    let mut recipe = Vec::new();
    let converted =
        convert_layer(blob.as_slice(), &mut image, &mut recipe, &std::env::temp_dir(), MAX_IMAGE);
    let Ok(converted) = converted else { return };
    assert_eq!(converted.image_size, image.get_ref().len() as u64);
    let open = || Cursor::new(recipe.as_slice());
    let tar = LayerTar::open(open(), open(), Cursor::new(image.get_ref()), converted.diff_id);
    let tar = tar.and_then(|mut tar| std::io::copy(&mut tar, &mut std::io::sink()));
    tar.expect("the tar stream comes back with the right digest");
    let mut reader = ErofsReader::open(image).expect("our own image opens");
    let mut seen = BTreeSet::new();
    let mut pending = vec![reader.root()];
    while let Some(nid) = pending.pop() {
        if !seen.insert(nid) {
            continue;
        }
        let inode = reader.inode(nid).expect("every inode reads");
        reader.xattrs(&inode).expect("its attributes read");
        reader.read_at(&inode, 0, &mut [0; 8192]).expect("its data reads");
        if inode.is_directory() {
            pending
                .extend(reader.entries(&inode).expect("its entries read").into_iter().map(|entry| entry.nid));
        }
    }
    assert_eq!(seen.len() as u64, reader.inode_count());
});

/// Checksums would keep most changes of the fuzzer from going anywhere.
fn correct_checksum(block: &mut [u8]) {
    if &block[257..262] == b"ustar" {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().copied().map(u32::from).sum();
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    }
}
