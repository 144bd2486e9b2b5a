//! Registries that lie about what they send.

use coracle_image_store::Digest;
use rstest::rstest;
use serde_json::json;

use crate::double::{Content, DOCKER_MANIFEST, Double, Image, Reply};
use crate::{Place, layer};

fn image() -> Image {
    Image::new("linux/amd64", &[layer("a", 150_000)])
}

/// Serves the image, but something else instead of its layer.
fn with_layer(image: Image, reply: Reply) -> Double {
    let digest = image.layer_digest(0).to_string();
    Double::start(move |seen| match seen.path.ends_with(&digest) {
        true => reply.clone(),
        false => image.serve(seen),
    })
}

#[tokio::test]
async fn a_layer_with_another_digest_is_refused() {
    let other = Image::new("linux/amd64", &[layer("b", 150_000)]).layers.remove(0);
    let image = image().edit(|manifest| manifest["layers"][0]["size"] = json!(other.len()));
    let registry = with_layer(image, Reply::new(200, other));
    let error = Place::new().refuses(&format!("{}/x", registry.domain())).await;
    assert!(error.contains("filesystem layer verification failed for digest"), "{error}");
}

#[tokio::test]
async fn a_layer_whose_content_the_config_does_not_know_is_refused() {
    let (honest, other) = (image(), Image::new("linux/amd64", &[layer("b", 100)]));
    let mut mixed = other.clone();
    mixed.layers = honest.layers.clone();
    let mixed = mixed.edit(|manifest| {
        manifest["layers"][0]["digest"] = json!(honest.layer_digest(0));
        manifest["layers"][0]["size"] = json!(honest.layers[0].len());
    });
    let registry = Double::start(move |seen| mixed.serve(seen));
    let error = Place::new().refuses(&format!("{}/x", registry.domain())).await;
    assert!(error.contains("(uncompressed)"), "{error}");
}

#[rstest]
#[case::shorter(-10, "sends")]
#[case::longer(10, "sends")]
#[tokio::test]
async fn a_layer_of_another_length_is_refused(#[case] more: i64, #[case] says: &str) {
    let image = image().edit(|manifest| {
        let size = manifest["layers"][0]["size"].as_i64().unwrap();
        manifest["layers"][0]["size"] = json!(size + more);
    });
    let registry = Double::start(move |seen| image.serve(seen));
    let error = Place::new().refuses(&format!("{}/x", registry.domain())).await;
    assert!(error.contains(says), "{error}");
}

#[tokio::test]
async fn an_endless_layer_is_given_up_at_its_length() {
    let registry = with_layer(image(), Reply::content(Content::Endless));
    let error = Place::new().refuses(&format!("{}/x", registry.domain())).await;
    assert!(error.contains("cannot be used") || error.contains("sends more"), "{error}");
}

#[tokio::test]
async fn an_endless_manifest_or_config_is_given_up() {
    let manifest = Double::start(|seen| match seen.path.as_str() {
        "/v2/" => Reply::json(&json!({})),
        _ => Reply::content(Content::Endless).with("Content-Type", DOCKER_MANIFEST),
    });
    let error = Place::new().refuses(&format!("{}/x", manifest.domain())).await;
    assert!(error.contains("a manifest of more than"), "{error}");
    let image = image();
    let digest = Digest::of(&image.config).to_string();
    let config = Double::start(move |seen| match seen.path.ends_with(&digest) {
        true => Reply::content(Content::Endless),
        false => image.serve(seen),
    });
    let error = Place::new().refuses(&format!("{}/x", config.domain())).await;
    assert!(error.contains("an image config of more than"), "{error}");
}

#[tokio::test]
async fn a_layer_that_is_always_cut_at_once_is_given_up() {
    let whole = image().layers.remove(0);
    let content = Content::Cut { bytes: whole[..10].to_vec(), length: whole.len() };
    let registry = with_layer(image(), Reply::content(content));
    let error = Place::new().refuses(&format!("{}/x", registry.domain())).await;
    assert!(error.contains("cannot talk to the registry") || error.contains("at another place"), "{error}");
    assert!(registry.count("/blobs/") < 10);
}

#[tokio::test]
async fn a_layer_that_changes_between_two_attempts_is_refused() {
    let image = image();
    let (digest, whole) = (image.layer_digest(0).to_string(), image.layers[0].clone());
    let first = std::sync::atomic::AtomicBool::new(true);
    let registry = Double::start(move |seen| {
        if !seen.path.ends_with(&digest) {
            return image.serve(seen);
        }
        if first.swap(false, std::sync::atomic::Ordering::SeqCst) {
            let bytes = whole[..100_000].to_vec();
            return Reply::content(Content::Cut { bytes, length: whole.len() });
        }
        let rest = vec![7; whole.len() - 100_000];
        let range = format!("bytes 100000-{}/{}", whole.len() - 1, whole.len());
        Reply::new(206, rest).with("Content-Range", &range)
    });
    Place::new().refuses(&format!("{}/x", registry.domain())).await;
}

#[tokio::test]
async fn a_manifest_with_another_digest_is_refused() {
    let image = image();
    let name = Digest::of(b"another");
    let registry = Double::start(move |seen| image.serve(seen));
    let error = Place::new().refuses(&format!("{}/x@{name}", registry.domain())).await;
    assert!(error.contains("manifest verification failed for digest"), "{error}");
}

#[tokio::test]
async fn a_config_with_another_digest_is_refused() {
    let image = image();
    let digest = Digest::of(&image.config).to_string();
    let registry = Double::start(move |seen| match seen.path.ends_with(&digest) {
        true => Reply::json(&json!({ "rootfs": { "type": "layers" } })),
        false => image.serve(seen),
    });
    let error = Place::new().refuses(&format!("{}/x", registry.domain())).await;
    assert!(error.contains("image config verification failed"), "{error}");
}

#[rstest]
#[case::negative(json!(-1))]
#[case::text(json!("many"))]
#[case::immense(json!(1e30))]
#[tokio::test]
async fn a_size_that_is_none_is_refused(#[case] size: serde_json::Value) {
    let image = image().edit(|manifest| manifest["layers"][0]["size"] = size);
    let registry = Double::start(move |seen| image.serve(seen));
    let error = Place::new().refuses(&format!("{}/x", registry.domain())).await;
    assert!(error.contains("malformed manifest"), "{error}");
}

#[tokio::test]
async fn more_layers_than_the_config_has_are_refused() {
    let image = image().edit(|manifest| {
        let first = manifest["layers"][0].clone();
        manifest["layers"].as_array_mut().unwrap().push(first);
    });
    let registry = Double::start(move |seen| image.serve(seen));
    let error = Place::new().refuses(&format!("{}/x", registry.domain())).await;
    assert!(error.contains("lists 2 layers"), "{error}");
}

#[tokio::test]
async fn redirects_without_end_and_to_no_web_server_are_refused() {
    for (target, says) in [("/v2/x/blobs/again", "without end"), ("file:///etc/passwd", "no web server")] {
        let registry = with_layer(image(), Reply::new(307, "").with("Location", target));
        let image = image();
        let config = Digest::of(&image.config).to_string();
        let all =
            Double::start(move |seen| match seen.path.contains("/blobs/") && !seen.path.ends_with(&config) {
                true => Reply::new(307, "").with("Location", target),
                false => image.serve(seen),
            });
        drop(registry);
        let error = Place::new().refuses(&format!("{}/x", all.domain())).await;
        assert!(error.contains(says), "{error}");
    }
}

#[tokio::test]
async fn an_overloaded_registry_is_asked_again_as_late_as_it_wants() {
    let image = image();
    let digest = image.layer_digest(0).to_string();
    let served = image.clone();
    let left = std::sync::atomic::AtomicUsize::new(4);
    let registry = Double::start(move |seen| {
        let is_counted = seen.path.ends_with(&digest) || seen.path.contains("/manifests/");
        let count = || {
            left.fetch_update(
                std::sync::atomic::Ordering::SeqCst,
                std::sync::atomic::Ordering::SeqCst,
                |left| left.checked_sub(1),
            )
        };
        match is_counted.then(count) {
            Some(Ok(4)) => Reply::refusal(429, "TOOMANYREQUESTS").with("Retry-After", "1"),
            Some(Ok(_)) => Reply::new(503, ""),
            _ => served.serve(seen),
        }
    });
    let begun = std::time::Instant::now();
    let place = Place::new();
    let (result, _) = place.pull_as(&format!("{}/x", registry.domain()), None, None).await;
    assert!(result.is_err(), "four failures in a row are too many");
    place.pull(&format!("{}/x", registry.domain())).await.unwrap();
    assert!(begun.elapsed() >= std::time::Duration::from_secs(1));
}

#[tokio::test]
async fn a_registry_that_wants_to_be_left_alone_for_long_is_not_waited_for() {
    let registry = Double::start(|seen| match seen.path.as_str() {
        "/v2/" => Reply::json(&json!({})),
        _ => Reply::refusal(429, "TOOMANYREQUESTS").with("Retry-After", "86400"),
    });
    let error = Place::new().refuses(&format!("{}/x", registry.domain())).await;
    assert_eq!(error, "toomanyrequests: toomanyrequests");
}
