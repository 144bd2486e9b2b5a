//! The store: what archives bring is kept, found, named and removed; bad archives leave nothing behind; a crash's debris
//! is cleared.
#![allow(missing_docs)]

mod common;

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use common::{Layout, Tar, chain, config_for, docker_archive, gzip, walk, zstd};
use coracle_image_store::{
    Commit, Digest, Error, ErrorKind, Image, ImageId, ImageStore, ImageUser, Import, Loaded, Platform,
    Reference, Removal,
};
use tempfile::TempDir;

struct Store {
    directory: TempDir,
    store: ImageStore,
}

impl Store {
    fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let store = ImageStore::open(directory.path()).unwrap();
        Self { directory, store }
    }

    fn load(&self, archive: &[u8]) -> Vec<Loaded> {
        self.store.load(archive, &mut |_| {}).unwrap_or_else(|error| panic!("{}", chain(&error)))
    }

    fn refusal(&self, archive: &[u8]) -> String {
        let error = self.store.load(archive, &mut |_| {}).expect_err("a bad archive was accepted");
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error:?}");
        chain(&error)
    }

    fn image(&self, name: &str) -> Image {
        self.store.image(&self.store.resolve(name).unwrap()).unwrap()
    }

    fn files(&self) -> Vec<String> {
        files(self.directory.path())
    }

    fn reopen(self) -> Self {
        drop(self.store);
        let store = ImageStore::open(self.directory.path()).unwrap();
        Self { directory: self.directory, store }
    }
}

/// All files of a store but its database.
fn files(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for directory in ["tmp", "layers", "blobs/sha256"] {
        for entry in fs::read_dir(root.join(directory)).unwrap() {
            found.push(format!("{directory}/{}", entry.unwrap().file_name().to_string_lossy()));
        }
    }
    found.sort();
    found
}

fn base_layer() -> Vec<u8> {
    Tar::new().file("bin/sh", b"shell").file("etc/passwd", b"root").finish()
}

fn second_layer() -> Vec<u8> {
    Tar::new().file("etc/.wh.passwd", b"").dir("home").finish()
}

const RUN: &str = r#""Cmd":["sh"],"Env":["A=b"],"User":"1000","Labels":{"k":"v"}"#;

fn busybox() -> Vec<u8> {
    let layer = base_layer();
    docker_archive(&["busybox:latest"], &config_for(&[&layer], RUN), &[&layer])
}

fn app() -> Vec<u8> {
    let layers = [base_layer(), second_layer()];
    let layers: Vec<_> = layers.iter().map(Vec::as_slice).collect();
    docker_archive(&["app:v1", "app:v2"], &config_for(&layers, ""), &layers)
}

#[test]
fn a_docker_archive_is_loaded_with_its_layers_and_tags() {
    let store = Store::new();
    let mut progress = Vec::new();
    let loaded = store.store.load(busybox().as_slice(), &mut |step| progress.push(step)).unwrap();
    assert_eq!(loaded[0].messages(), ["Loaded image: busybox:latest"]);
    let image = store.image("busybox");
    assert_eq!(image.id, ImageId::of_config(&image.config_raw));
    assert_eq!(image.config.config.cmd.as_deref(), Some(&["sh".to_owned()][..]));
    assert_eq!(
        (image.config.config.user.as_str(), image.platform.to_string()),
        ("1000", "linux/amd64".to_owned())
    );
    assert_eq!(image.created.unwrap().as_second(), 1_714_979_289);
    let tree = walk(image.layers[0].open_layer().unwrap());
    assert_eq!(tree["bin/sh"].text(), "shell");
    assert_eq!(fs::metadata(&image.layers[0].path).unwrap().len(), image.layers[0].size);
    let last = progress.last().unwrap();
    assert_eq!((last.current, last.layer.as_str()), (last.total, "000000000000"));
    let history = image.history();
    assert_eq!((history[0].id, history[0].size), (Some(image.id), image.size));
    assert_eq!(history[0].tags, ["busybox:latest"]);
}

#[test]
fn images_of_one_store_share_layers_and_survive_a_restart() {
    let store = Store::new();
    store.load(&busybox());
    store.load(&gzip(&app()));
    assert_eq!(store.files().iter().filter(|file| file.ends_with(".erofs")).count(), 2);
    let before = store.image("app:v2");
    let store = store.reopen();
    let image = store.image("app:v1");
    assert_eq!((image.id, image.layers.len()), (before.id, 2));
    assert_eq!(image.layers[0], store.image("busybox").layers[0]);
    assert_eq!(image.repo_tags, ["app:v1", "app:v2"]);
    let list = store.store.list().unwrap();
    assert_eq!(list.len(), 2);
    assert!(list.iter().any(|line| line.labels.get("k").is_some_and(|value| value == "v")));
}

#[test]
fn loading_again_changes_nothing() {
    let store = Store::new();
    let first = store.load(&busybox());
    let files = store.files();
    let again = store.load(&zstd(&busybox()));
    assert_eq!((first[0].id, store.files()), (again[0].id, files));
    assert!(again[0].replaced.is_empty());
}

#[test]
fn a_tag_moves_to_the_image_that_was_loaded_last() {
    let store = Store::new();
    let old = store.load(&busybox())[0].id;
    let layer = second_layer();
    let new = store.load(&docker_archive(&["busybox:latest"], &config_for(&[&layer], ""), &[&layer]));
    assert_eq!(new[0].replaced, [(Reference::parse("busybox").unwrap(), old)]);
    assert!(new[0].messages()[0].contains("renaming the old one"));
    assert_eq!(store.image("busybox").id, new[0].id);
    assert!(store.store.image(&old).unwrap().repo_tags.is_empty());
}

#[test]
fn old_archives_with_links_between_layers_load() {
    let layer = base_layer();
    let config = config_for(&[&layer, &layer], "");
    let hex = "c".repeat(64);
    let tar = Tar::new()
        .file("manifest.json", br#"[{"Config":"conf","RepoTags":null,"Layers":["a/layer.tar","b.tar"]}]"#)
        .file("conf", &config)
        .symlink("a/layer.tar", &format!("../{hex}.tar"))
        .hard_link("b.tar", &format!("{hex}.tar"))
        .file(&format!("{hex}.tar"), &layer)
        .finish();
    let store = Store::new();
    let loaded = store.load(&tar);
    assert_eq!(loaded[0].messages(), [format!("Loaded image ID: {}", loaded[0].id)]);
    assert_eq!(store.store.image(&loaded[0].id).unwrap().layers.len(), 2);
    assert_eq!(store.store.resolve(&loaded[0].id.short()).unwrap(), loaded[0].id);
}

#[test]
fn an_oci_layout_is_loaded_with_its_names_and_digests() {
    let (base, second) = (base_layer(), second_layer());
    let mut layout = Layout::default();
    let config = config_for(&[&base, &second], RUN);
    let named = layout.image(&config, &[&gzip(&base), &zstd(&second)]);
    layout.list_named(&named, "ghcr.io/team/app:v1");
    let dangling = layout.image(&config_for(&[&base], ""), &[&base]);
    layout.list(&dangling, "");
    let store = Store::new();
    let loaded = store.load(&layout.finish());
    assert_eq!(loaded.len(), 2);
    let image = store.image("ghcr.io/team/app:v1");
    assert_eq!(image.id, ImageId::of_config(&config));
    let digest = named.split('"').nth(3).unwrap();
    assert_eq!(image.repo_digests, [format!("ghcr.io/team/app@{digest}")]);
    assert_eq!(store.store.resolve(&image.repo_digests[0]).unwrap(), image.id);
    assert_eq!(loaded.iter().filter(|loaded| loaded.tags.is_empty()).count(), 1);
}

#[test]
fn of_an_index_the_image_for_this_machine_is_chosen() {
    let layer = base_layer();
    let mut layout = Layout::default();
    let host = Platform::host();
    let ours = config_for(&[&layer], r#""User":"ours""#);
    let mut entries = Vec::new();
    for (config, platform) in [
        (config_for(&[&layer], r#""User":"other""#), r#"{"os":"linux","architecture":"s390x"}"#.to_owned()),
        (ours.clone(), format!(r#"{{"os":"linux","architecture":"{}"}}"#, host.architecture)),
        (config_for(&[&layer], r#""User":"att""#), r#"{"os":"unknown","architecture":"unknown"}"#.to_owned()),
    ] {
        let image = layout.image(&config, &[&layer]);
        entries.push(format!(r#"{{{image},"platform":{platform}}}"#));
    }
    let index = layout.blob(format!(r#"{{"manifests":[{}]}}"#, entries.join(",")).as_bytes());
    layout.list_named(&index, "multi:latest");
    let store = Store::new();
    let loaded = store.load(&layout.finish());
    assert_eq!(loaded.len(), 1);
    assert_eq!(loaded[0].id, ImageId::of_config(&ours));
    assert!(store.image("multi").platform.runs_on_host());
}

#[test]
fn an_image_for_another_machine_loads_and_says_so() {
    let layer = base_layer();
    let config = String::from_utf8(config_for(&[&layer], "")).unwrap().replace("amd64", "s390x");
    let store = Store::new();
    let loaded = store.load(&docker_archive(&["other"], config.as_bytes(), &[&layer]));
    assert!(!loaded[0].platform.runs_on_host());
    assert_eq!(loaded[0].platform.to_string(), "linux/s390x");
}

#[test]
fn bad_archives_are_refused_and_leave_nothing() {
    let layer = base_layer();
    let config = config_for(&[&layer], "");
    let with_layer = |layer: &[u8]| docker_archive(&["bad"], &config, &[layer]);
    let evil = |path| {
        let layer = Tar::new().file(path, b"").finish();
        docker_archive(&["bad"], &config_for(&[&layer], ""), &[&layer])
    };
    let dead_link = Tar::new().hard_link("a", "nowhere").finish();
    let through_link = Tar::new().symlink("a", "/etc").file("a/passwd", b"").finish();
    let manifest = |text: &str| Tar::new().file("manifest.json", text.as_bytes()).file("c", &config).finish();
    let renamed = {
        let text = format!(r#"[{{"Config":"{}.json","Layers":["l"]}}]"#, "0".repeat(64));
        let tar = Tar::new().file("manifest.json", text.as_bytes()).file("l", &layer);
        tar.file(&format!("{}.json", "0".repeat(64)), &config).finish()
    };
    let store = Store::new();
    for (archive, expected) in [
        (b"".to_vec(), "archive is not a tar, gzip or zstd stream"),
        (b"hello world".to_vec(), "archive is not a tar, gzip or zstd stream"),
        (gzip(b"hello world"), "archive is not a tar, gzip or zstd stream"),
        (Tar::new().file("etc/passwd", b"").finish(), "neither a manifest.json nor an index.json"),
        (Tar::new().file("../manifest.json", b"[]").finish(), "entry `../manifest.json` is refused"),
        (busybox()[..3000].to_vec(), "archive is truncated"),
        (gzip(&busybox())[..300].to_vec(), "archive is truncated"),
        (with_layer(&second_layer()), "wrong digest of layer `0000"),
        (with_layer(b"not a layer at all"), "layer is not a tar, gzip or zstd stream"),
        (with_layer(&gzip(&layer)[..100]), "layer is truncated"),
        (evil("../../etc/cron.d/evil"), "entry `../../etc/cron.d/evil` is refused: its path contains `..`"),
        (
            docker_archive(&[], &config_for(&[&dead_link], ""), &[&dead_link]),
            "its hard link target is not in the layer",
        ),
        (docker_archive(&[], &config_for(&[&through_link], ""), &[&through_link]), "`a` is a symbolic link"),
        (docker_archive(&["Bad:Name"], &config, &[&layer]), "repository name must be lowercase"),
        (docker_archive(&[&format!("x@sha256:{}", "0".repeat(64))], &config, &[&layer]), "contains a digest"),
        (
            docker_archive(&["bad"], &config_for(&[], ""), &[&layer]),
            "lists 1 layers, but the image config has 0",
        ),
        (docker_archive(&["bad"], b"{\"rootfs\":1}", &[]), "the image config is malformed"),
        (manifest("{"), "`manifest.json` in the archive is malformed"),
        (manifest(r#"[{"Config":"missing"}]"#), "archive lacks the image config `missing`"),
        (manifest(r#"[{"Config":"c","Layers":["missing"]}]"#), "archive lacks layer `missing`"),
        (renamed, "wrong digest of image config"),
    ] {
        let refusal = store.refusal(&archive);
        assert!(refusal.contains(expected), "{refusal:?} should contain {expected:?}");
        assert!(store.files().is_empty(), "{refusal}: {:?}", store.files());
        assert!(store.store.list().unwrap().is_empty());
    }
}

#[test]
fn an_oci_layout_with_a_wrong_digest_or_size_is_refused_by_name() {
    let layer = base_layer();
    let config = config_for(&[&layer], "");
    let other = config_for(&[&layer], r#""User":"mallory""#);
    let packed = gzip(&layer);
    let store = Store::new();
    let refusal = |change: &dyn Fn(&mut Layout, &str) -> Option<String>| {
        let mut layout = Layout::default();
        let image = layout.image(&config, &[&packed]);
        let listed = change(&mut layout, &image).unwrap_or(image);
        layout.list_named(&listed, "bad");
        let refusal = store.refusal(&layout.finish());
        assert!(store.files().is_empty(), "{refusal}: {:?}", store.files());
        refusal
    };
    let descriptor = |content: &[u8]| Layout::default().blob(content);
    let swap = |content: &[u8], by: &[u8]| {
        let descriptor = descriptor(content);
        let by = by.to_vec();
        refusal(&move |layout, _| {
            layout.tamper(&descriptor, &by);
            None
        })
    };
    let digest = |content: &[u8]| coracle_image_store::Digest::of(content).to_string();
    let mut same_length = config.clone();
    let year = same_length.windows(4).position(|window| window == b"2024").unwrap();
    same_length[year..year + 4].copy_from_slice(b"2025");
    let text = swap(&config, &same_length);
    assert!(text.contains("wrong digest of the image config"), "{text}");
    assert!(text.contains(&digest(&config)) && text.contains(&digest(&same_length)), "{text}");
    assert!(swap(&config, &other).contains("wrong size of `blobs/sha256/"));
    assert!(swap(&packed, &gzip(&second_layer())).contains("wrong size of `blobs/sha256/"));
    assert!(swap(&packed, b"garbage").contains("layer is not a tar, gzip or zstd stream"));
    let mut repacked = packed.clone();
    // The time in gzip's header: another blob of the same content and length.
    repacked[4] ^= 1;
    let text = swap(&packed, &repacked);
    assert!(text.contains("wrong digest of layer") && text.contains(&digest(&repacked)), "{text}");
    let text = refusal(&|layout, image| {
        layout.remove(image);
        None
    });
    assert!(text.contains("archive lacks the manifest"), "{text}");
    let text = refusal(&|_, image| Some(format!("{}9", image)));
    assert!(text.contains("wrong size"), "{text}");
    let text = refusal(&|_, _| Some(r#""digest":"sha512:00","size":1"#.to_owned()));
    assert!(text.contains("not a digest"), "{text}");
    // An index that contains itself cannot be made, but one that is too deep can.
    let text = refusal(&|layout, image| {
        Some((0..20).fold(image.to_owned(), |inner, _| {
            layout.blob(format!(r#"{{"manifests":[{{{inner}}}]}}"#).as_bytes())
        }))
    });
    assert!(text.contains("nested too deeply"), "{text}");
}

#[test]
fn names_resolve_by_dockers_rules() {
    let store = Store::new();
    let id = store.load(&busybox())[0].id;
    let hex = id.to_string()[7..].to_owned();
    for name in [
        "busybox",
        "busybox:latest",
        "docker.io/library/busybox",
        &id.to_string(),
        &hex,
        &hex[..6],
        &id.to_string()[..12],
    ] {
        assert_eq!(store.store.resolve(name).unwrap(), id, "{name}");
    }
    for (name, expected) in [
        ("nothing", "No such image: nothing:latest"),
        ("busybox:2", "No such image: busybox:2"),
        (&"0".repeat(64), &format!("No such image: {}", "0".repeat(64))),
        ("", "invalid reference format"),
        ("Busybox", "repository name must be lowercase"),
    ] {
        let error = store.store.resolve(name).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    let layer = second_layer();
    let ids: Vec<_> = (0..40)
        .map(|n| {
            store.load(&docker_archive(&[], &config_for(&[&layer], &format!(r#""User":"{n}""#)), &[&layer]))
                [0]
            .id
        })
        .collect();
    let shared = ids
        .iter()
        .map(|id| id.to_string()[7..8].to_owned())
        .find(|first| ids.iter().filter(|id| id.to_string()[7..].starts_with(first.as_str())).count() > 1);
    assert!(matches!(store.store.resolve(&shared.unwrap()), Err(Error::Ambiguous { .. })));
}

#[test]
fn tags_are_added_and_removed_and_the_last_one_takes_the_image_along() {
    let store = Store::new();
    let id = store.load(&busybox())[0].id;
    store.load(&app());
    store.store.tag("busybox", &Reference::parse("mine:1").unwrap()).unwrap();
    assert_eq!(store.image("mine:1").id, id);
    let digest_reference = Reference::parse(&format!("x@{id}")).unwrap();
    assert_eq!(store.store.tag("busybox", &digest_reference).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(
        store.store.tag("nothing", &Reference::parse("x").unwrap()).unwrap_err().kind(),
        ErrorKind::NotFound
    );
    let free = |_: &ImageId| None;
    let removed = store.store.remove("busybox", false, &free).unwrap();
    assert_eq!(removed, [Removal::Untagged("busybox:latest".to_owned())]);
    let removed = store.store.remove("mine:1", false, &free).unwrap();
    assert_eq!(removed, [Removal::Untagged("mine:1".to_owned()), Removal::Deleted(id.to_string())]);
    assert!(matches!(store.store.image(&id), Err(Error::NotFound { .. })));
    // The other image shares the lower layer.
    let image = store.image("app:v1");
    assert!(image.layers.iter().all(|layer| layer.open_layer().is_ok()));
    store.store.remove(&image.id.short(), true, &free).unwrap();
    assert!(store.files().is_empty(), "{:?}", store.files());
    assert_eq!(store.store.remove("app:v1", false, &free).unwrap_err().kind(), ErrorKind::NotFound);
}

fn user(is_running: bool) -> impl Fn(&ImageId) -> Option<ImageUser> {
    move |_| Some(ImageUser { container: "0123456789ab".to_owned(), is_running })
}

#[test]
fn what_a_running_container_uses_is_not_deleted() {
    let store = Store::new();
    let id = store.load(&busybox())[0].id;
    let used = user(true);
    let conflict = |name: &str, force: bool| {
        let error = store.store.remove(name, force, &used).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict);
        error.to_string()
    };
    let short = id.short();
    assert_eq!(
        conflict("busybox", false),
        format!(
            "conflict: unable to remove repository reference \"busybox\" (must force) - container 0123456789ab is using its referenced image {short}"
        )
    );
    assert_eq!(
        conflict(&id.to_string(), true),
        format!(
            "conflict: unable to delete {short} (cannot be forced) - image is being used by running container 0123456789ab"
        )
    );
    let removed = store.store.remove("busybox", true, &used).unwrap();
    assert_eq!(removed, [Removal::Untagged("busybox:latest".to_owned())]);
    assert!(store.store.image(&id).unwrap().layers[0].open_layer().is_ok());
    // Tags in several repositories need force when the image is named by its id.
    for tag in ["a", "b"] {
        store.store.tag(&id.to_string(), &Reference::parse(tag).unwrap()).unwrap();
    }
    let error = store.store.remove(&short, false, &|_| None).unwrap_err();
    assert!(error.to_string().contains("(must be forced) - image is referenced in multiple repositories"));
    assert_eq!(store.store.remove(&short, true, &|_| None).unwrap().len(), 3);
}

#[test]
fn an_image_removed_by_force_stays_for_its_stopped_container_alone() {
    let store = Store::new();
    let id = store.load(&busybox())[0].id;
    let error = store.store.remove(&id.short(), false, &user(false)).unwrap_err();
    assert!(error.to_string().contains("(must be forced) - image is being used by stopped container"));
    let removed = store.store.remove(&id.short(), true, &user(false)).unwrap();
    assert_eq!(removed, [Removal::Untagged("busybox:latest".to_owned()), Removal::Deleted(id.to_string())]);
    for name in ["busybox".to_owned(), id.to_string(), id.short()] {
        assert_eq!(store.store.resolve(&name).unwrap_err().kind(), ErrorKind::NotFound);
    }
    assert!(store.store.list().unwrap().is_empty());
    let store = store.reopen();
    assert!(store.store.image(&id).unwrap().layers[0].open_layer().is_ok());
    store.store.forget_removed(&|_| true).unwrap();
    assert!(store.store.image(&id).is_ok());
    // Loading makes it an image again; without that it goes with its container.
    store.load(&busybox());
    store.store.forget_removed(&|_| false).unwrap();
    assert_eq!(store.store.resolve("busybox").unwrap(), id);
    store.store.remove("busybox", true, &user(false)).unwrap();
    store.store.forget_removed(&|_| false).unwrap();
    assert!(store.files().is_empty(), "{:?}", store.files());
}

#[test]
fn a_saved_archive_loads_again_and_is_the_same_whenever_it_is_saved() {
    let store = Store::new();
    store.load(&busybox());
    store.load(&gzip(&app()));
    let save = |store: &Store, names: &[&str]| {
        let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
        let mut archive = Vec::new();
        store.store.save(&names).unwrap().write_to(&mut archive).unwrap();
        archive
    };
    let archive = save(&store, &["app", "busybox:latest", "busybox"]);
    assert!(save(&store, &["app", "busybox"]) == archive);
    let other = Store::new();
    let mut loaded: Vec<_> = other.load(&archive).iter().flat_map(|image| image.messages()).collect();
    loaded.sort();
    assert_eq!(loaded, ["Loaded image: app:v1", "Loaded image: app:v2", "Loaded image: busybox:latest"]);
    for name in ["app:v1", "app:v2", "busybox"] {
        assert_eq!(other.image(name).layers.len(), store.image(name).layers.len());
        assert_eq!(other.image(name).config_raw, store.image(name).config_raw);
    }
    assert!(save(&other, &["app", "busybox"]) == archive);
    // By its id it has no name.
    let id = store.image("busybox").id;
    let third = Store::new();
    let loaded = third.load(&save(&store, &[&id.short()]));
    assert_eq!((loaded[0].id, loaded[0].tags.len()), (id, 0));
    let error = store.store.save(&["app:v1".to_owned(), "nothing".to_owned()]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[test]
fn layers_stay_while_they_are_saved() {
    let store = Store::new();
    store.load(&busybox());
    let archive = store.store.save(&["busybox".to_owned()]).unwrap();
    store.store.remove("busybox", false, &|_| None).unwrap();
    let mut bytes = Vec::new();
    archive.write_to(&mut bytes).unwrap();
    drop(archive);
    assert!(store.files().is_empty(), "{:?}", store.files());
    store.load(&bytes);
}

#[test]
fn a_tar_stream_is_imported_with_changes() {
    let store = Store::new();
    let import = Import {
        tag: Some(Reference::parse("imported:1").unwrap()),
        changes: vec!["CMD [\"/bin/sh\"]".to_owned(), "ENV A=1".to_owned()],
        comment: "Imported from -".to_owned(),
        platform: None,
    };
    let layer = Tar::new().file("bin/sh", b"elf").finish();
    let created = store.store.import(gzip(&layer).as_slice(), &import).unwrap();
    let image = store.image("imported:1");
    assert_eq!((image.id, created.replaced), (created.id, None));
    assert_eq!(image.config.config.cmd, Some(vec!["/bin/sh".to_owned()]));
    assert_eq!(image.layers[0].diff_id, Digest::of(&layer));
    assert_eq!(image.history()[0].comment, "Imported from -");
    let again = store.store.import(Tar::new().file("x", b"").finish().as_slice(), &import).unwrap();
    assert_eq!(again.replaced, Some(created.id));
    for (bytes, changes) in [(&b"no tar"[..], vec![]), (layer.as_slice(), vec!["RUN x".to_owned()])] {
        let error = store.store.import(bytes, &Import { changes, ..Import::default() }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error:?}");
    }
    assert!(!store.files().iter().any(|file| file.starts_with("tmp/")));
}

#[test]
fn a_commit_adds_a_layer_to_an_image_or_only_its_history() {
    let store = Store::new();
    let parent = store.load(&busybox())[0].id;
    let commit = |tag: &str| Commit {
        parent,
        config: store.image("busybox").config.config,
        changes: vec!["LABEL boat=coracle".to_owned()],
        tag: Some(Reference::parse(tag).unwrap()),
        author: "me".to_owned(),
        comment: "by hand".to_owned(),
        created_by: "sh".to_owned(),
    };
    let differences = Tar::new().file("new", b"1").file(".wh.old", b"").finish();
    store.store.commit(differences.as_slice(), commit("mine:1")).unwrap();
    let (parent, image) = (store.image("busybox"), store.image("mine:1"));
    assert_eq!(image.layers[..1], parent.layers[..]);
    assert_eq!(image.layers[1].diff_id, Digest::of(&differences));
    assert_eq!(image.config.config.labels["boat"], "coracle");
    let newest = &image.history()[0];
    assert_eq!((newest.created_by.as_str(), newest.comment.as_str()), ("sh", "by hand"));
    assert_eq!(newest.size, image.layers[1].size + image.layers[1].recipe_size);

    store.store.commit(Tar::new().finish().as_slice(), commit("mine:2")).unwrap();
    let image = store.image("mine:2");
    assert_eq!((image.layers.len(), image.history()[0].size), (1, 0));
    let summaries = store.store.list().unwrap();
    let shared = |id| summaries.iter().find(|summary| summary.id == id).unwrap().shared_size;
    assert_eq!(shared(parent.id), parent.size);
    let total: u64 = files(store.directory.path())
        .iter()
        .filter(|file| file.starts_with("layers/"))
        .map(|file| fs::metadata(store.directory.path().join(file)).unwrap().len())
        .sum();
    assert_eq!(store.store.layers_size().unwrap(), total);
}

#[test]
fn only_one_process_can_open_a_store() {
    let store = Store::new();
    let error = ImageStore::open(store.directory.path()).unwrap_err();
    assert!(matches!(error, Error::Locked { .. }), "{error:?}");
    assert!(error.to_string().contains("in use by another process"));
}

#[test]
fn the_debris_of_a_crash_is_cleared_at_the_next_start() {
    let store = Store::new();
    store.load(&busybox());
    let good = store.files();
    let root = store.directory.path();
    // Killed while converting, after renaming but before the commit, and after a commit that deleted an image.
    File::create(root.join("tmp/layer-abc")).unwrap();
    File::create(root.join(format!("layers/{}.erofs", "1".repeat(64)))).unwrap();
    File::create(root.join(format!("blobs/sha256/{}", "2".repeat(64)))).unwrap();
    File::create(root.join("layers/what.is.this")).unwrap();
    fs::create_dir(root.join("tmp/directory")).unwrap();
    let store = store.reopen();
    assert_eq!(store.files(), good);
    assert!(store.image("busybox").layers[0].open_layer().is_ok());
}

/// A connection that breaks in the middle.
struct Broken<'a>(&'a [u8]);

impl Read for Broken<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.0.read(buffer)? {
            0 => Err(io::Error::new(io::ErrorKind::ConnectionReset, "the client went away")),
            read => Ok(read),
        }
    }
}

#[test]
fn a_client_that_goes_away_leaves_nothing() {
    let store = Store::new();
    let archive = busybox();
    for length in [0, 100, 600, 2000, archive.len() - 1] {
        let error = store.store.load(Broken(&archive[..length]), &mut |_| {}).unwrap_err();
        assert!(chain(&error).contains("the client went away"), "{error:?}");
        assert!(store.files().is_empty());
    }
}

#[test]
fn loads_of_the_same_image_at_once_are_safe() {
    let store = Store::new();
    let archive = app();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| store.load(&archive));
        }
        scope.spawn(|| {
            for _ in 0..20 {
                let _ = store.store.remove("app:v1", true, &|_| None);
                let _ = store.store.remove("app:v2", true, &|_| None);
            }
        });
    });
    store.load(&archive);
    let image = store.image("app:v1");
    assert!(image.layers.iter().all(|layer| layer.open_layer().is_ok()));
    let files = store.files();
    let count = |start: &str| files.iter().filter(|file| file.starts_with(start)).count();
    assert_eq!((count("layers/"), count("blobs/"), count("tmp/")), (4, 1, 0));
}

#[test]
fn a_layers_tar_stream_comes_back_from_the_store() {
    let store = Store::new();
    store.load(&gzip(&app()));
    for layer in store.image("app:v1").layers {
        let mut tar = store.store.layer_tar(&layer.diff_id).unwrap();
        let mut bytes = Vec::new();
        tar.read_to_end(&mut bytes).unwrap();
        assert_eq!((Digest::of(&bytes), bytes.len() as u64), (layer.diff_id, tar.length()));
    }
    let unknown = store.store.layer_tar(&Digest::of(b"")).unwrap_err();
    assert_eq!(unknown.kind(), ErrorKind::Internal);
}

#[test]
fn a_layer_of_an_early_version_runs_and_gets_its_tar_stream_by_the_next_load() {
    let store = Store::new();
    store.load(&busybox());
    let layer = store.image("busybox").layers.remove(0);
    fs::remove_file(layer.path.with_extension("recipe")).unwrap();
    let store = store.reopen();
    assert!(layer.open_layer().is_ok());
    assert!(
        chain(&store.store.layer_tar(&layer.diff_id).unwrap_err()).contains("load or pull its image again")
    );
    store.load(&busybox());
    assert!(store.store.layer_tar(&layer.diff_id).is_ok());
}

#[test]
fn a_missing_file_of_the_store_is_an_error_and_loading_again_repairs_it() {
    let store = Store::new();
    store.load(&busybox());
    let layer = store.image("busybox").layers[0].clone();
    fs::remove_file(&layer.path).unwrap();
    assert_eq!(layer.open_layer().unwrap_err().kind(), ErrorKind::Internal);
    store.load(&busybox());
    assert!(layer.open_layer().is_ok());
    let id = store.store.resolve("busybox").unwrap();
    fs::write(store.directory.path().join("blobs/sha256").join(&id.to_string()[7..]), b"{}").unwrap();
    assert!(matches!(store.store.image(&id), Err(Error::Corrupt { .. })));
}

/// The other side of the test below: loads what never ends, and says when it is in the middle of it.
#[test]
fn load_until_killed() {
    let Some(root) = std::env::var_os("CORACLE_TEST_STORE") else { return };
    let store = ImageStore::open(Path::new(&root)).unwrap();
    let mut header = Tar::header(tar::EntryType::Regular, 0o644);
    header.as_old_mut().name[..5].copy_from_slice(b"x.tar");
    header.set_size(1 << 40);
    header.set_cksum();
    let outer = header.as_bytes().to_vec();
    let endless = outer.as_slice().chain(header.as_bytes().as_slice()).chain(io::repeat(1));
    let error = store.load(endless, &mut |step| println!("converted {} bytes", step.current)).unwrap_err();
    panic!("the load ended by itself: {}", chain(&error));
}

#[test]
fn a_load_that_is_killed_leaves_nothing() {
    use std::io::BufRead;
    let store = Store::new();
    store.load(&busybox());
    let good = store.files();
    let Store { directory, store } = store;
    drop(store);
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "load_until_killed", "--nocapture"])
        .env("CORACLE_TEST_STORE", directory.path())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = io::BufReader::new(child.stdout.take().unwrap()).lines();
    let in_the_middle = lines.by_ref().map(Result::unwrap).filter(|line| line.contains("converted")).nth(3);
    assert!(in_the_middle.is_some());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(files(directory.path()).iter().any(|file| file.starts_with("tmp/layer-")));
    let store = ImageStore::open(directory.path()).unwrap();
    assert_eq!(files(directory.path()), good);
    assert!(store.resolve("busybox").is_ok());
}
