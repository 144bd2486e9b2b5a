//! Bad input gets a clear error, loses nothing and leaves nothing behind.

use std::{path::Path, process::Stdio};

use coracle_tests::{Entry, Installation, image_archive, oci_archive_with, run};

/// Names of all files below a folder.
fn files(folder: &Path) -> Vec<String> {
    let mut all: Vec<_> = run(std::process::Command::new("find").arg(folder).args(["-type", "f"]))
        .ok()
        .out()
        .lines()
        .map(str::to_owned)
        .collect();
    all.sort();
    all
}

#[test]
fn bad_archives_are_refused_and_leave_nothing() {
    let coracle = Installation::new().with_busybox();
    let images = coracle.home().join("images");
    let before = files(&images);
    let whole = std::fs::read(image_archive("busybox.docker.tar")).unwrap();
    let file = Entry::File("etc/motd", b"hello\n");
    let cases: &[(&str, Vec<u8>, &str)] = &[
        ("truncated", whole[..whole.len() / 2].to_vec(), ""),
        ("empty", Vec::new(), ""),
        ("not an archive", b"hello".repeat(1000), ""),
        (
            "wrong digest",
            oci_archive_with("bad:1", std::slice::from_ref(&file), |p| p.diff_id = "0".repeat(64)),
            "0000",
        ),
        ("dot dot", oci_archive_with("bad:2", &[Entry::File("../../escape", b"x")], |_| ()), "escape"),
        (
            "through a symlink",
            oci_archive_with("bad:3", &[Entry::Symlink("out", "/"), Entry::File("out/escape", b"x")], |_| ()),
            "out",
        ),
        (
            "hard link to nowhere",
            oci_archive_with("bad:4", &[Entry::Hardlink("a", "../../etc/passwd")], |_| ()),
            "",
        ),
        (
            "a layer that is not gzip",
            oci_archive_with("bad:5", std::slice::from_ref(&file), |p| {
                p.layer = b"BZh91AY&SY, not gzip".repeat(100)
            }),
            "",
        ),
    ];
    for (name, archive, words) in cases {
        let path = coracle.scratch().join("bad.tar");
        std::fs::write(&path, archive).unwrap();
        let refused = coracle.docker(&["load", "-i", path.to_str().unwrap()]);
        assert!(refused.code != 0 && !refused.err().is_empty(), "{name}: {refused:?}");
        assert!(refused.err().contains(words), "{name}: {}", refused.err());
        assert_eq!(files(&images), before, "{name} left something");
        assert_eq!(coracle.docker(&["images", "-q"]).text().lines().count(), 1, "{name}");
    }
    // An absolute name is one below the image's root, as everywhere.
    let absolute = coracle.scratch().join("absolute.tar");
    std::fs::write(
        &absolute,
        oci_archive_with("absolute:1", &[Entry::Folder("/etc"), Entry::File("/etc/motd", b"x")], |_| ()),
    )
    .unwrap();
    coracle.docker(&["load", "-i", absolute.to_str().unwrap()]).ok();

    let foreign = coracle.scratch().join("foreign.tar");
    std::fs::write(&foreign, oci_archive_with("foreign:1", &[file], |p| p.architecture = "s390x".to_owned()))
        .unwrap();
    coracle.docker(&["load", "-i", foreign.to_str().unwrap()]).ok();
    coracle.docker(&["run", "--rm", "foreign:1"]).code(125).says("s390x");
    assert_eq!(coracle.docker(&["run", "--rm", "busybox", "echo", "still well"]).text(), "still well");
    assert_eq!(coracle.docker(&["ps", "-aq"]).text(), "");
}

#[test]
fn a_client_that_dies_in_the_middle_of_a_load_leaves_nothing() {
    let coracle = Installation::new();
    coracle.coracle(&["up"]).ok();
    let images = coracle.home().join("images");
    let before = files(&images);
    let archive = std::fs::read(image_archive("busybox.docker.tar")).unwrap();
    let mut load =
        coracle.command("docker").args(["load"]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    std::io::Write::write_all(load.stdin.as_mut().unwrap(), &archive[..archive.len() / 2]).unwrap();
    load.kill().unwrap();
    load.wait().unwrap();
    // A second load is served after the first was given up, so its end is the event to wait for.
    coracle.docker_with_input(&["load"], &archive[..100]).code(1);
    coracle.coracle(&["down"]).ok();
    coracle.coracle(&["up"]).ok();
    assert_eq!(files(&images), before);
    assert_eq!(coracle.docker(&["images", "-q"]).text(), "");
}

#[test]
fn a_full_disk_is_an_error_and_nothing_is_lost() {
    let mut coracle = Installation::new();
    std::fs::create_dir(coracle.home()).unwrap();
    let home = coracle.home();
    run(std::process::Command::new("mount").args(["-t", "tmpfs", "-o", "size=24m", "tmpfs"]).arg(&home)).ok();
    coracle = coracle.with_busybox();
    let filler = home.join("filler");
    run(std::process::Command::new("dd")
        .args(["if=/dev/zero", "bs=64k"])
        .arg(format!("of={}", filler.display())));
    let full = coracle.docker(&["load", "-i", image_archive("layered.docker.tar").to_str().unwrap()]);
    assert!(full.code != 0 && full.err().to_lowercase().contains("space"), "{full:?}");
    std::fs::remove_file(&filler).unwrap();
    assert_eq!(coracle.docker(&["images", "-q"]).text().lines().count(), 1);
    coracle.docker(&["load", "-i", image_archive("layered.docker.tar").to_str().unwrap()]).ok();
    coracle.coracle(&["down"]).ok();
    run(std::process::Command::new("umount").arg(&home)).ok();
}
