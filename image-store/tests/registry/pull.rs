//! What a pull brings, and what it says meanwhile.

use std::sync::Arc;
use std::time::Duration;

use coracle_image_store::registry::{LayerStatus, PullEvent};
use coracle_image_store::{Digest, Platform};
use serde_json::json;

use crate::double::{Content, Double, Image, OCI_INDEX, Reply, descriptor, gzip, range};
use crate::{Place, layer};

#[tokio::test]
async fn an_image_comes_with_its_layers_and_names() {
    let image = Image::new("linux/amd64", &[layer("a", 5000), layer("b", 70_000)]);
    let served = image.clone();
    let registry = Double::start(move |seen| served.serve(seen));
    let (place, name) = (Place::new(), format!("{}/team/app:v1", registry.domain()));
    let (pulled, events) = place.pull_as(&name, None, None).await;
    let pulled = pulled.unwrap();
    assert!(!pulled.was_up_to_date);
    assert_eq!(pulled.digest, Digest::of(&image.manifest));
    let stored = place.store.image(&place.store.resolve(&name).unwrap()).unwrap();
    assert_eq!(stored.id, pulled.id);
    assert_eq!(stored.config_raw, image.config);
    assert_eq!(stored.layers.len(), 2);
    assert_eq!(stored.repo_digests, [format!("{}/team/app@{}", registry.domain(), pulled.digest)]);
    let of_first: Vec<&LayerStatus> = events
        .iter()
        .filter_map(|event| match event {
            PullEvent::Layer { blob, status } if *blob == image.layer_digest(0) => Some(status),
            _ => None,
        })
        .filter(|status| !matches!(status, LayerStatus::Downloading { .. } | LayerStatus::Waiting))
        .collect();
    let total = image.layers[0].len() as u64;
    assert_eq!(
        of_first,
        [
            &LayerStatus::PullingFsLayer,
            &LayerStatus::VerifyingChecksum,
            &LayerStatus::DownloadComplete,
            &LayerStatus::Extracting { current: total, total },
            &LayerStatus::PullComplete
        ]
    );
    assert!(matches!(&events[0], PullEvent::Pulling { name, .. } if name == "v1"));

    let again = place.pull(&name).await.unwrap();
    assert!(again.was_up_to_date);
    assert_eq!(registry.count("/blobs/"), 3);
}

#[tokio::test]
async fn layers_that_are_there_are_not_fetched_again() {
    let (base, top) = (layer("base", 9000), layer("top", 3000));
    let small = Image::new("linux/amd64", std::slice::from_ref(&base));
    let large = Image::new("linux/amd64", &[base.clone(), top, base]);
    let (first, second) = (small.clone(), large.clone());
    let registry = Double::start(move |seen| match seen.path.contains("/large/") {
        true => second.serve(seen),
        false => first.serve(seen),
    });
    let place = Place::new();
    place.pull(&format!("{}/small", registry.domain())).await.unwrap();
    let (pulled, events) = place.pull_as(&format!("{}/large", registry.domain()), None, None).await;
    assert_eq!(place.store.image(&pulled.unwrap().id).unwrap().layers.len(), 3);
    assert!(events.iter().any(|event| matches!(event, PullEvent::Layer { blob, status: LayerStatus::AlreadyExists } if *blob == large.layer_digest(0))));
    assert_eq!(registry.count(&small.layer_digest(0).to_string()), 1);
}

#[tokio::test]
async fn gzip_zstd_and_plain_layers_are_taken() {
    let tar = layer("a", 20_000);
    let zstd = zstd::encode_all(tar.as_slice(), 3).unwrap();
    for (packed, kind) in [
        (gzip(&tar), "application/vnd.oci.image.layer.v1.tar+gzip"),
        (zstd, "application/vnd.oci.image.layer.v1.tar+zstd"),
        (tar.clone(), "application/vnd.oci.image.layer.v1.tar"),
    ] {
        let mut image =
            Image::packed("linux/amd64", std::slice::from_ref(&tar), vec![packed], kind).edit(|manifest| {
                manifest["config"]["mediaType"] = json!("application/vnd.oci.image.config.v1+json");
                manifest.as_object_mut().unwrap().remove("mediaType");
            });
        image.manifest_type = "application/vnd.oci.image.manifest.v1+json".to_owned();
        let registry = Double::start(move |seen| image.serve(seen));
        let place = Place::new();
        let pulled = place.pull(&format!("{}/x", registry.domain())).await.unwrap();
        assert_eq!(place.store.image(&pulled.id).unwrap().layers[0].diff_id, Digest::of(&tar), "{kind}");
    }
}

#[tokio::test]
async fn the_platform_that_was_asked_for_is_chosen_from_an_index() {
    let amd = Image::new("linux/amd64", &[layer("amd", 100)]);
    let arm = Image::new("linux/arm64", &[layer("arm", 100)]);
    let index = {
        let entry = |image: &Image, architecture: &str| {
            let mut entry = descriptor(&image.manifest_type, &image.manifest);
            entry["platform"] = json!({ "os": "linux", "architecture": architecture });
            entry
        };
        let mut attestation = entry(&amd, "unknown");
        attestation["annotations"] = json!({ "vnd.docker.reference.type": "attestation-manifest" });
        json!({ "schemaVersion": 2, "manifests": [attestation, { "mediaType": "application/x-new", "odd": 1 },
            entry(&amd, "amd64"), entry(&arm, "arm64")] })
        .to_string()
    };
    let (first, second, top) = (amd.clone(), arm.clone(), index.clone());
    let registry = Double::start(move |seen| {
        if seen.path.ends_with("/manifests/latest") {
            return Reply::new(200, top.clone()).with("Content-Type", OCI_INDEX);
        }
        let arms = [Digest::of(&second.manifest), Digest::of(&second.config), second.layer_digest(0)];
        match arms.iter().any(|digest| seen.path.ends_with(&digest.to_string())) {
            true => second.serve(seen),
            false => first.serve(seen),
        }
    });
    let (place, name) = (Place::new(), format!("{}/x", registry.domain()));
    let host = place.pull(&name).await.unwrap();
    assert_eq!(host.digest, Digest::of(index.as_bytes()));
    assert!(place.store.image(&host.id).unwrap().platform.runs_on_host());
    let (pulled, _) = place.pull_as(&name, Some("linux/arm64"), None).await;
    assert_eq!(place.store.image(&pulled.unwrap().id).unwrap().platform.architecture, "arm64");
    let (refused, _) = place.pull_as(&name, Some("linux/s390x"), None).await;
    assert_eq!(
        refused.unwrap_err().to_string(),
        "no matching manifest for linux/s390x in the manifest list entries"
    );
}

#[tokio::test]
async fn a_single_image_for_another_platform_is_refused_only_if_one_was_asked_for() {
    let image = Image::new("linux/s390x", &[layer("a", 100)]);
    let registry = Double::start(move |seen| image.serve(seen));
    let (place, name) = (Place::new(), format!("{}/x", registry.domain()));
    let (refused, _) = place.pull_as(&name, Some("linux/amd64"), None).await;
    let refused = refused.unwrap_err().to_string();
    assert!(
        refused.contains("its platform (linux/s390x) does not match the specified platform (linux/amd64)")
    );
    place.is_empty().await;
    place.pull(&name).await.unwrap();
}

#[tokio::test]
async fn an_image_by_digest_has_no_tag() {
    let image = Image::new(&Platform::host().to_string(), &[layer("a", 100)]);
    let digest = Digest::of(&image.manifest);
    let registry = Double::start(move |seen| image.serve(seen));
    let (place, name) = (Place::new(), format!("{}/x@{digest}", registry.domain()));
    let pulled = place.pull(&name).await.unwrap();
    let image = place.store.image(&pulled.id).unwrap();
    assert_eq!((image.repo_tags.len(), image.repo_digests), (0, vec![name.clone()]));
    assert_eq!(place.store.resolve(&name).unwrap(), pulled.id);
    assert!(place.pull(&name).await.unwrap().was_up_to_date);
}

#[tokio::test]
async fn a_cut_download_resumes_where_it_was_cut() {
    let image = Image::new("linux/amd64", &[layer("big", 600_000)]);
    let (served, digest) = (image.clone(), image.layer_digest(0));
    let registry = Double::start(move |seen| {
        let reply = served.serve(seen);
        match (&reply.content, seen.path.ends_with(&digest.to_string())) {
            (Content::Whole(bytes), true) if bytes.len() > 150_000 => {
                let cut = Content::Cut { bytes: bytes[..150_000].to_vec(), length: bytes.len() };
                Reply { content: cut, ..reply }
            }
            _ => reply,
        }
    });
    let place = Place::new();
    place.pull(&format!("{}/x", registry.domain())).await.unwrap();
    let resumed: Vec<usize> = registry.seen().iter().filter_map(range).collect();
    assert_eq!(resumed, [150_000, 300_000, 450_000, 600_000]);
}

#[tokio::test]
async fn a_registry_that_cannot_resume_is_read_from_the_start() {
    let image = Image::new("linux/amd64", &[layer("big", 400_000)]);
    let (served, digest) = (image.clone(), image.layer_digest(0));
    let first = std::sync::atomic::AtomicBool::new(true);
    let registry = Double::start(move |seen| {
        if !seen.path.ends_with(&digest.to_string()) {
            return served.serve(seen);
        }
        let bytes = served.layers[0].clone();
        match first.swap(false, std::sync::atomic::Ordering::SeqCst) {
            true => Reply::content(Content::Cut { bytes: bytes[..100_000].to_vec(), length: bytes.len() }),
            false => Reply::new(200, bytes),
        }
    });
    Place::new().pull(&format!("{}/x", registry.domain())).await.unwrap();
    assert_eq!(registry.count(&digest.to_string()), 2);
}

#[tokio::test]
async fn a_slow_download_ends_well_and_a_stalled_one_is_tried_again() {
    let image = Image::new("linux/amd64", &[layer("slow", 3000), layer("stalled", 200_000)]);
    let (slow, stalled) = (image.layer_digest(0), image.layer_digest(1));
    let served = image.clone();
    let registry = Double::start(move |seen| {
        let reply = served.serve(seen);
        let Content::Whole(bytes) = reply.content.clone() else { return reply };
        if seen.path.ends_with(&slow.to_string()) {
            let content = Content::Slow { bytes, piece: 300, pause: Duration::from_millis(20) };
            return Reply { content, ..reply };
        }
        if seen.path.ends_with(&stalled.to_string()) && range(seen).is_none() {
            let content = Content::Stalled { bytes: bytes[..100_000].to_vec(), length: bytes.len() };
            return Reply { content, ..reply };
        }
        reply
    });
    Place::new().pull(&format!("{}/x", registry.domain())).await.unwrap();
    assert_eq!(registry.count(&stalled.to_string()), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_pulls_of_one_layer_download_it_once() {
    let image = Image::new("linux/amd64", &[layer("shared", 200_000)]);
    let digest = image.layer_digest(0);
    let registry = Double::start(move |seen| {
        let reply = image.serve(seen);
        match (&reply.content, seen.path.ends_with(&digest.to_string())) {
            (Content::Whole(bytes), true) => {
                let (bytes, pause) = (bytes.clone(), Duration::from_millis(50));
                Reply { content: Content::Slow { bytes, piece: 50_000, pause }, ..reply }
            }
            _ => reply,
        }
    });
    let place = Arc::new(Place::new());
    let names = ["one", "two", "three"].map(|name| format!("{}/{name}", registry.domain()));
    let [one, two, three] = names.each_ref();
    let (a, b, c) = tokio::join!(place.pull(one), place.pull(two), place.pull(three));
    assert_eq!(a.unwrap().id, b.unwrap().id);
    c.unwrap();
    assert_eq!(registry.count(&digest.to_string()), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_is_given_up_leaves_nothing_but_others_go_on() {
    let image = Image::new("linux/amd64", &[layer("shared", 300_000)]);
    let digest = image.layer_digest(0);
    let registry = Double::start(move |seen| {
        let reply = image.serve(seen);
        match (&reply.content, seen.path.ends_with(&digest.to_string())) {
            (Content::Whole(bytes), true) => {
                let (bytes, pause) = (bytes.clone(), Duration::from_millis(50));
                Reply { content: Content::Slow { bytes, piece: 50_000, pause }, ..reply }
            }
            _ => reply,
        }
    });
    let (place, name) = (Place::new(), format!("{}/x", registry.domain()));
    let given_up = tokio::time::timeout(Duration::from_millis(120), place.pull(&name)).await;
    assert!(given_up.is_err());
    place.is_empty().await;
    let (first, second) =
        tokio::join!(tokio::time::timeout(Duration::from_millis(120), place.pull(&name)), place.pull(&name));
    assert!(first.is_err());
    second.unwrap();
    assert_eq!(registry.count(&digest.to_string()), 2);
}
