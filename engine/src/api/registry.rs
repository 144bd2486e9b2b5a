//! What clients ask registries by way of the engine, beside pull and push: log in, look, search.

use coracle_image_store::registry::{Credentials, RegistryErrorKind, RegistrySettings};
use serde_json::{Value, json};

use crate::{
    error::{Error, Kind, Result},
    http::{Request, Response, body, filters::Filters},
    registries,
};

/// Docker's own default and bound.
const DEFAULT_LIMIT: u32 = 25;
const MAX_LIMIT: u32 = 100;

/// `POST /auth`.
pub(crate) async fn log_in(mut request: Request) -> Result<Response> {
    let body = request.read_body().await?;
    let credentials: Credentials = serde_json::from_slice(&body)
        .map_err(|error| Error::invalid(format!("cannot read the credentials: {error}")))?;
    let domain = registries::server_domain(&credentials.serveraddress)?;
    let credentials = credentials.completed().unwrap_or_default();
    let core = &request.core;
    let settings = core.config.registries.load()?;
    let token =
        core.registries.log_in(&settings, &domain, &credentials).await.map_err(|error| {
            match error.kind() {
                RegistryErrorKind::Unauthorized => Error::new(Kind::Unauthorized, error.to_string()),
                _ => error.into(),
            }
        })?;
    let token = token.unwrap_or_default();
    Ok(body::ok(&json!({ "Status": "Login Succeeded", "IdentityToken": token })))
}

/// `GET /distribution/NAME/json`.
pub(crate) async fn distribution(request: &Request, name: &str) -> Result<Response> {
    let reference = registries::reference(name)?;
    let credentials = registries::credentials(&request.headers)?;
    let core = &request.core;
    let settings = core.config.registries.load()?;
    let found = core.registries.inspect(&settings, &reference, credentials.as_ref()).await?;
    Ok(body::ok(&json!({
        "Descriptor": {
            "mediaType": found.media_type,
            "digest": found.digest.to_string(),
            "size": found.size,
        },
        "Platforms": found.platforms,
    })))
}

/// `GET /images/search`.
pub(crate) async fn search(request: &Request) -> Result<Response> {
    let term = request.query.get("term").ok_or_else(|| Error::invalid("no term to search for in `term`"))?;
    let limit = request.query.number("limit")?.filter(|limit| *limit != 0).unwrap_or(DEFAULT_LIMIT);
    if limit > MAX_LIMIT {
        return Err(Error::invalid(format!("limit {limit} is outside the range of [1, {MAX_LIMIT}]")));
    }
    let filters = Filters::of(&request.query, &["is-automated", "is-official", "stars"])?;
    let truth = |name: &str| -> Result<Option<bool>> {
        match filters.values(name) {
            [] => Ok(None),
            [one] if matches!(one.as_str(), "true" | "1") => Ok(Some(true)),
            [one] if matches!(one.as_str(), "false" | "0") => Ok(Some(false)),
            other => Err(Error::invalid(format!("invalid filter '{name}={}'", clip(&other.join(","))))),
        }
    };
    let (official, automated) = (truth("is-official")?, truth("is-automated")?);
    let mut stars = 0_i64;
    for value in filters.values("stars") {
        let number = value.parse::<i64>();
        stars =
            stars.max(number.map_err(|_| Error::invalid(format!("invalid filter 'stars={}'", clip(value))))?);
    }
    let credentials = registries::credentials(&request.headers)?;
    let core = &request.core;
    let settings = core.config.registries.load()?;
    let found = core.registries.search(&settings, term, limit, credentials.as_ref()).await?;
    let fits = found.into_iter().filter(|one| {
        official.is_none_or(|wanted| wanted == one.is_official)
            && automated.is_none_or(|wanted| wanted == one.is_automated)
            && one.star_count >= stars
    });
    Ok(body::ok(&fits.take(limit as usize).collect::<Vec<_>>()))
}

fn clip(text: &str) -> String {
    text.chars().take(60).collect()
}

/// `RegistryConfig` of `GET /info`.
pub(crate) fn config(settings: &RegistrySettings) -> Value {
    let (networks, hosts): (Vec<&String>, Vec<&String>) =
        settings.insecure_registries.iter().partition(|entry| entry.contains('/'));
    let networks: Vec<&str> =
        ["::1/128", "127.0.0.0/8"].into_iter().chain(networks.into_iter().map(String::as_str)).collect();
    let index = |name: &str, mirrors: &[String], secure: bool, official: bool| json!({ "Name": name, "Mirrors": mirrors, "Secure": secure, "Official": official });
    let mut indexes = serde_json::Map::new();
    indexes.insert("docker.io".to_owned(), index("docker.io", &settings.mirrors, true, true));
    for host in hosts {
        indexes.insert(host.clone(), index(host, &[], false, false));
    }
    json!({
        "AllowNondistributableArtifactsCIDRs": null,
        "AllowNondistributableArtifactsHostnames": null,
        "InsecureRegistryCIDRs": networks,
        "IndexConfigs": indexes,
        "Mirrors": settings.mirrors,
    })
}
