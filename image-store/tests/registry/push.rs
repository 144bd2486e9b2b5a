//! Pushes to registries that fail half-way, move uploads, or refuse.

use std::sync::{Arc, Mutex};

use coracle_image_store::registry::RegistryError;
use coracle_image_store::{Digest, Reference};
use serde_json::json;
use tokio::sync::mpsc;

use crate::double::{Double, Reply, Seen};
use crate::{Place, layer};

/// What a registry has got.
#[derive(Default)]
struct Got {
    upload: Vec<u8>,
    blobs: Vec<Vec<u8>>,
    manifest: Option<Vec<u8>>,
    patches: usize,
}

/// An honest registry for one upload at a time; `break_first` has it forget most of the first piece and fail.
fn registry(break_first: bool) -> (Double, Arc<Mutex<Got>>) {
    let got = Arc::new(Mutex::new(Got::default()));
    let shared = Arc::clone(&got);
    let double = Double::start(move |seen| answer(&mut shared.lock().unwrap(), seen, break_first));
    (double, got)
}

fn answer(got: &mut Got, seen: &Seen, break_first: bool) -> Reply {
    let path = seen.path.as_str();
    let at = "/v2/x/blobs/uploads/one?state=abc";
    match seen.method.as_str() {
        "GET" if path == "/v2/" => Reply::json(&json!({})),
        "HEAD" => {
            let has = got.blobs.iter().any(|blob| path.ends_with(&Digest::of(blob).to_string()));
            Reply::new(if has { 200 } else { 404 }, "")
        }
        "POST" => {
            got.upload.clear();
            Reply::new(202, "").with("Location", at)
        }
        "PATCH" => {
            got.patches += 1;
            if break_first && got.patches == 1 {
                got.upload = seen.body[..100].to_vec();
                return Reply::new(503, "");
            }
            let from = seen
                .header("content-range")
                .map_or(0, |range| range.split('-').next().unwrap().parse::<usize>().unwrap());
            assert_eq!(from, got.upload.len(), "it goes on where it broke");
            got.upload.extend(&seen.body);
            Reply::new(202, "").with("Location", at)
        }
        "GET" => {
            let range = format!("0-{}", got.upload.len() - 1);
            Reply::new(204, "").with("Location", at).with("Range", &range)
        }
        "PUT" if path.contains("/manifests/") => {
            got.manifest = Some(seen.body.clone());
            Reply::new(201, "")
        }
        "PUT" => {
            assert!(path.contains("state=abc&digest=sha256%3A"), "{path}");
            let mut blob = std::mem::take(&mut got.upload);
            blob.extend(&seen.body);
            assert!(path.ends_with(&Digest::of(&blob).hex()));
            got.blobs.push(blob);
            Reply::new(201, "")
        }
        _ => Reply::new(405, ""),
    }
}

/// A place with an image that came from a file system.
fn place(name: &str) -> (Place, Reference) {
    let place = Place::new();
    let name = Reference::parse(name).unwrap();
    let import = coracle_image_store::Import { tag: Some(name.clone()), ..Default::default() };
    place.store.import(layer("big", 200_000).as_slice(), &import).unwrap();
    (place, name)
}

async fn push(place: &Place, name: &Reference) -> Result<Digest, RegistryError> {
    let (events, mut inbox) = mpsc::channel(1000);
    let pushed = place.registries.push(&place.settings, name, None, &events).await;
    inbox.close();
    pushed.map(|pushed| pushed.digest)
}

#[tokio::test]
async fn an_upload_that_breaks_goes_on_where_it_broke() {
    for break_first in [false, true] {
        let (registry, got) = registry(break_first);
        let (place, name) = place(&format!("{}/x:1", registry.domain()));
        let digest = push(&place, &name).await.unwrap();
        let got = got.lock().unwrap();
        assert_eq!((got.blobs.len(), got.patches), (2, 1 + usize::from(break_first)));
        assert_eq!(Digest::of(got.manifest.as_ref().unwrap()), digest);
        let mut tar = Vec::new();
        std::io::copy(&mut flate2::read::GzDecoder::new(got.blobs[0].as_slice()), &mut tar).unwrap();
        assert_eq!(tar, layer("big", 200_000));
    }
}

#[tokio::test]
async fn what_is_not_here_or_not_allowed_is_not_pushed() {
    let registry = Double::start(|seen| match (seen.method.as_str(), seen.path.as_str()) {
        (_, "/v2/") => Reply::json(&json!({})),
        ("HEAD", _) => Reply::new(404, ""),
        _ => Reply::refusal(403, "DENIED"),
    });
    let (place, name) = place(&format!("{}/x:1", registry.domain()));
    assert_eq!(push(&place, &name).await.unwrap_err().to_string(), "denied: denied");
    let other = Reference::parse(&format!("{}/y:1", registry.domain())).unwrap();
    assert!(push(&place, &other).await.unwrap_err().to_string().contains("does not exist locally"));
    // What was packed for it is gone.
    let left = std::fs::read_dir(place.root.path().join("tmp")).unwrap().count();
    assert_eq!(left, 0);
}
