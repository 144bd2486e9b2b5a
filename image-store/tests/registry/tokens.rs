//! Who someone is: passwords, tokens, and token servers that lie.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use coracle_image_store::registry::{Credentials, RegistryErrorKind};
use rstest::rstest;
use serde_json::json;

use crate::double::{Content, Double, Image, Reply, Seen};
use crate::{Place, layer};

fn image() -> Image {
    Image::new("linux/amd64", &[layer("a", 1000)])
}

fn sailor() -> Credentials {
    Credentials { username: "sailor".to_owned(), password: "ahoy".to_owned(), ..Credentials::default() }
}

const BASIC: &str = "Basic c2FpbG9yOmFob3k=";

/// A registry that wants a token; the token server is at the same address, and answers this.
fn with_tokens(answer: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Double {
    let image = image();
    Double::start(move |seen| {
        if seen.path.starts_with("/token") {
            return answer(seen);
        }
        if seen.header("authorization") == Some("Bearer good") {
            return image.serve(seen);
        }
        let challenge = "Bearer realm=\"/token\",service=\"double\",scope=\"repository:other:pull\"";
        Reply::refusal(401, "UNAUTHORIZED").with("WWW-Authenticate", challenge)
    })
}

#[tokio::test]
async fn a_token_is_fetched_once_for_what_is_pulled() {
    let registry = with_tokens(|_| Reply::json(&json!({ "token": "good" })));
    Place::new().pull(&format!("{}/a/b", registry.domain())).await.unwrap();
    let seen = registry.seen();
    let tokens: Vec<&Seen> = seen.iter().filter(|seen| seen.path.starts_with("/token")).collect();
    assert_eq!(tokens.len(), 1);
    assert_eq!(tokens[0].path, "/token?service=double&scope=repository%3Aa%2Fb%3Apull");
    assert_eq!(tokens[0].header("authorization"), None);
}

#[tokio::test]
async fn name_and_password_go_to_the_token_server_only() {
    let registry = with_tokens(|_| Reply::json(&json!({ "access_token": "good", "expires_in": 300 })));
    let name = format!("{}/a", registry.domain());
    Place::new().pull_as(&name, None, Some(sailor())).await.0.unwrap();
    for seen in registry.seen() {
        let is_token = seen.path.starts_with("/token");
        assert_eq!(seen.header("authorization") == Some(BASIC), is_token, "{}", seen.path);
        assert!(!is_token || seen.path.contains("account=sailor"));
    }
}

#[tokio::test]
async fn an_identity_token_is_posted() {
    let registry = with_tokens(|seen| match (seen.method.as_str(), String::from_utf8_lossy(&seen.body)) {
        ("POST", body)
            if body.contains("refresh_token=secret") && body.contains("grant_type=refresh_token") =>
        {
            Reply::json(&json!({ "access_token": "good" }))
        }
        _ => Reply::refusal(401, "UNAUTHORIZED"),
    });
    let known = Credentials { identitytoken: "secret".to_owned(), ..sailor() };
    let name = format!("{}/a", registry.domain());
    Place::new().pull_as(&name, None, Some(known)).await.0.unwrap();
    assert!(registry.seen().iter().all(|seen| !seen.path.contains("secret")));
}

#[rstest]
#[case::nothing(Reply::json(&json!({})))]
#[case::empty(Reply::json(&json!({ "token": "" })))]
#[case::no_text(Reply::json(&json!({ "token": 7 })))]
#[case::no_json(Reply::new(200, "<html>"))]
#[case::two_lines(Reply::json(&json!({ "token": "good\r\nX-Other: 1" })))]
#[case::endless(Reply::content(Content::Endless))]
#[case::elsewhere(Reply::new(302, "").with("Location", "ftp://other/"))]
#[case::in_circles(Reply::new(302, "").with("Location", "/token"))]
#[case::refused(Reply::refusal(403, "DENIED"))]
#[tokio::test]
async fn a_token_server_that_lies_is_not_believed(#[case] reply: Reply) {
    let registry = with_tokens(move |_| reply.clone());
    let place = Place::new();
    place.refuses(&format!("{}/a", registry.domain())).await;
    assert!(registry.seen().len() < 30);
}

#[tokio::test]
async fn a_token_that_the_registry_never_likes_is_not_fetched_for_ever() {
    let registry = with_tokens(|_| Reply::json(&json!({ "token": "bad" })));
    let (result, _) = Place::new().pull_as(&format!("{}/a", registry.domain()), None, None).await;
    assert_eq!(result.unwrap_err().kind(), RegistryErrorKind::Unauthorized);
    assert_eq!((registry.count("/token"), registry.count("/manifests/")), (2, 2));
}

#[tokio::test]
async fn a_token_that_has_ended_is_renewed() {
    let (count, image) = (Arc::new(AtomicUsize::new(0)), image());
    let tokens = Arc::clone(&count);
    let registry = Double::start(move |seen| {
        if seen.path.starts_with("/token") {
            let number = tokens.fetch_add(1, Ordering::SeqCst);
            return Reply::json(&json!({ "token": format!("t{number}") }));
        }
        let newest = format!("Bearer t{}", tokens.load(Ordering::SeqCst).saturating_sub(1));
        // The first token is good for the manifest only.
        let is_stale = seen.path.contains("/blobs/") && seen.header("authorization") == Some("Bearer t0");
        match seen.header("authorization") == Some(newest.as_str()) && !is_stale {
            true => image.serve(seen),
            false => Reply::refusal(401, "UNAUTHORIZED").with("WWW-Authenticate", "Bearer realm=\"/token\""),
        }
    });
    Place::new().pull(&format!("{}/a", registry.domain())).await.unwrap();
    assert_eq!(count.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_password_goes_to_a_registry_that_asks_for_one() {
    let image = image();
    let registry = Double::start(move |seen| match seen.header("authorization") {
        Some(BASIC) => image.serve(seen),
        _ => Reply::refusal(401, "UNAUTHORIZED").with("WWW-Authenticate", "Basic realm=\"x\""),
    });
    let (place, name) = (Place::new(), format!("{}/a", registry.domain()));
    let (refused, _) = place.pull_as(&name, None, None).await;
    assert!(refused.unwrap_err().to_string().contains("no basic auth credentials"));
    let wrong = Credentials { password: "wrong".to_owned(), ..sailor() };
    let (refused, _) = place.pull_as(&name, None, Some(wrong)).await;
    assert_eq!(refused.unwrap_err().to_string(), "unauthorized: unauthorized");
    place.pull_as(&name, None, Some(sailor())).await.0.unwrap();
}

#[tokio::test]
async fn log_in_tells_good_from_bad_and_hands_an_identity_token_on() {
    let registry = with_tokens(|seen| match seen.header("authorization") {
        Some(BASIC) if seen.path.contains("offline_token=true") => {
            Reply::json(&json!({ "token": "good", "refresh_token": "for later" }))
        }
        _ => Reply { status: 401, ..Reply::json(&json!({ "details": "incorrect username or password" })) },
    });
    let place = Place::new();
    let log_in =
        async |known: &Credentials| place.registries.log_in(&place.settings, &registry.domain(), known).await;
    assert_eq!(log_in(&sailor()).await.unwrap().as_deref(), Some("for later"));
    let error = log_in(&Credentials { password: "x".to_owned(), ..sailor() }).await.unwrap_err();
    assert_eq!(error.to_string(), "unauthorized: incorrect username or password");
    assert_eq!(error.kind(), RegistryErrorKind::Unauthorized);
}

#[tokio::test]
async fn what_is_denied_reads_as_dockers_users_know_it() {
    let registry = Double::start(|seen| match seen.path.as_str() {
        "/v2/" => Reply::json(&json!({})),
        path if path.contains("/secret/") => Reply::refusal(403, "DENIED"),
        path if path.contains("/none/") => Reply::refusal(404, "NAME_UNKNOWN"),
        _ => Reply::refusal(404, "MANIFEST_UNKNOWN"),
    });
    let (place, at) = (Place::new(), registry.domain());
    for (name, says) in [
        (
            "secret",
            format!(
                "pull access denied for {at}/secret, repository does not exist or may require 'docker login': denied: denied"
            ),
        ),
        ("none", format!("repository {at}/none not found: name unknown: name unknown")),
        ("x:7", format!("manifest for {at}/x:7 not found: manifest unknown: manifest unknown")),
    ] {
        let error = place.pull(&format!("{at}/{name}")).await.unwrap_err();
        assert_eq!(error.to_string(), says);
        assert_eq!(error.kind(), RegistryErrorKind::NotFound);
    }
}
