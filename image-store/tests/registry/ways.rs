//! The ways to a registry: redirects, mirrors, proxies, lists in pages.

use coracle_image_store::Reference;
use coracle_image_store::registry::{Credentials, Proxies};
use serde_json::json;

use crate::double::{Double, Image, Reply};
use crate::{Place, layer};

fn image() -> Image {
    Image::new("linux/amd64", &[layer("a", 1000)])
}

fn sailor() -> Credentials {
    Credentials { username: "sailor".to_owned(), password: "ahoy".to_owned(), ..Credentials::default() }
}

#[tokio::test]
async fn a_redirect_to_another_host_is_followed_without_credentials() {
    let (front, back) = (image(), image());
    let storage = Double::start(move |seen| back.serve(seen));
    let target = format!("http://{}", storage.domain());
    let registry = Double::start(move |seen| {
        if seen.header("authorization").is_none() {
            return Reply::refusal(401, "UNAUTHORIZED").with("WWW-Authenticate", "Basic realm=\"x\"");
        }
        match seen.path.contains("/blobs/") {
            true => Reply::new(307, "").with("Location", &format!("{target}{}", seen.path)),
            false => front.serve(seen),
        }
    });
    let name = format!("{}/x", registry.domain());
    Place::new().pull_as(&name, None, Some(sailor())).await.0.unwrap();
    assert_eq!(storage.seen().len(), 2);
    assert!(storage.seen().iter().all(|seen| seen.header("authorization").is_none()));
}

#[tokio::test]
async fn a_mirror_stands_in_for_docker_hub_and_never_sees_its_credentials() {
    let image = image();
    let mirror = Double::start(move |seen| image.serve(seen));
    let broken = Double::start(|_| Reply::new(500, ""));
    let mut place = Place::new();
    place.settings.retries.attempts = 1;
    place.settings.mirrors =
        vec![format!("http://{}", broken.domain()), format!("http://{}", mirror.domain())];
    place.pull_as("busybox", None, Some(sailor())).await.0.unwrap();
    assert!(place.store.resolve("docker.io/library/busybox:latest").is_ok());
    assert_eq!(mirror.count("/v2/library/busybox/manifests/latest"), 1);
    let all = mirror.seen().into_iter().chain(broken.seen());
    assert!(all.into_iter().all(|seen| seen.header("authorization").is_none()));
}

#[tokio::test]
async fn proxies_are_used_as_they_should_be() {
    let image = image();
    let proxy = Double::start(move |seen| {
        let Some(path) = seen.path.strip_prefix("http://registry.example:5000") else {
            return Reply::new(403, "");
        };
        image.serve(&crate::double::Seen { path: path.to_owned(), ..seen.clone() })
    });
    let mut place = Place::new();
    let at = format!("http://user:word@{}", proxy.domain());
    place.settings.proxies = Proxies::Fixed { http: at.clone(), https: at, no: "direct.example".to_owned() };
    place.settings.insecure_registries =
        vec!["registry.example:5000".to_owned(), "direct.example:5000".to_owned()];
    place.pull("registry.example:5000/x").await.unwrap();
    let seen = proxy.seen();
    // An insecure registry is tried with TLS first, through a tunnel.
    assert_eq!((seen[0].method.as_str(), seen[0].path.as_str()), ("CONNECT", "registry.example:5000"));
    for request in &seen {
        assert_eq!(request.header("proxy-authorization"), Some("Basic dXNlcjp3b3Jk"), "{}", request.path);
    }
    place.settings.retries.attempts = 1;
    place.pull("direct.example:5000/x").await.unwrap_err();
    assert_eq!(proxy.seen().len(), seen.len());
}

#[tokio::test]
async fn a_proxy_of_an_unknown_kind_is_refused_by_name() {
    let mut place = Place::new();
    let socks = || "socks5://127.0.0.1:1".to_owned();
    place.settings.proxies = Proxies::Fixed { http: socks(), https: socks(), no: String::new() };
    let error = place.refuses("registry.example/x").await;
    assert!(error.contains("socks5"), "{error}");
}

#[tokio::test]
async fn tags_come_in_pages_and_a_list_that_leads_to_itself_ends() {
    let registry = Double::start(|seen| match seen.path.as_str() {
        "/v2/" => Reply::json(&json!({})),
        "/v2/a/x/tags/list" => Reply::json(&json!({ "tags": ["a", "b"] }))
            .with("Link", "</v2/a/x/tags/list?last=b>; rel=\"next\""),
        _ => Reply::json(&json!({ "tags": ["c"] })).with("Link", "</v2/a/x/tags/list?last=c>; rel=\"next\""),
    });
    let place = Place::new();
    let name = Reference::parse(&format!("{}/a/x", registry.domain())).unwrap();
    assert_eq!(place.registries.tags(&place.settings, &name, None).await.unwrap(), ["a", "b", "c"]);
    assert_eq!(registry.count("/tags/list"), 3);
}
