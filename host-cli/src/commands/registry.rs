//! `coracle login`, `logout` and `search`.

use std::io::Read;

use anyhow::Context;
use http::Method;
use http_body_util::BodyExt;
use serde::Deserialize;

use crate::{
    args::{LoginArgs, LogoutArgs, SearchArgs},
    client::{self, escape},
    docker_config::{DockerConfig, Login},
    failure::{Failure, Outcome},
    paths::Home,
    table::Table,
    terminal,
};

/// How much of a description a table shows.
const DESCRIPTION: usize = 45;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct LoggedIn {
    #[serde(default)]
    status: String,
    #[serde(default)]
    identity_token: String,
}

/// The registry that an address names, as logins are kept for it.
fn domain(server: Option<&str>) -> String {
    let address = server.unwrap_or_default();
    let bare =
        address.strip_prefix("https://").or_else(|| address.strip_prefix("http://")).unwrap_or(address);
    match bare.split('/').next().unwrap_or_default() {
        "" | "index.docker.io" | "registry-1.docker.io" => "docker.io".to_owned(),
        host => host.to_owned(),
    }
}

/// Checks a login at the registry and keeps it.
pub(super) async fn log_in(home: &Home, args: &LoginArgs) -> Outcome {
    let domain = domain(args.server.as_deref());
    let username = match &args.username {
        Some(name) => name.clone(),
        None if args.password_stdin => {
            return Err(Failure::new("Must provide --username with --password-stdin"));
        }
        None => terminal::ask("Username: ", true)?,
    };
    let password = match &args.password {
        Some(password) => {
            terminal::complain("WARNING! Using --password via the CLI is insecure. Use --password-stdin.\n");
            password.clone()
        }
        None if args.password_stdin => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("cannot read the password")?;
            text.trim_end_matches(['\r', '\n']).to_owned()
        }
        None => terminal::ask("Password: ", false)?,
    };
    if username.is_empty() || password.is_empty() {
        return Err(Failure::new("username and password are both needed to log in"));
    }
    let docker = client::connect(home).await?;
    let mut login = Login { username, password, serveraddress: domain.clone(), ..Login::default() };
    let answer: LoggedIn = docker.post_json("/auth", &login).await.context("cannot log in")?;
    login.identitytoken = answer.identity_token;
    let mut config = DockerConfig::load()?;
    if config.store(&domain, &login)? {
        terminal::complain(&format!(
            "WARNING! Your credentials are stored unencrypted in '{}'.\nA credential helper (`credsStore` there) keeps them safer.\n",
            config.path()
        ));
    }
    terminal::print(&format!("{}\n", answer.status))?;
    Ok(0)
}

/// Forgets a login.
pub(super) fn log_out(args: &LogoutArgs) -> Outcome {
    let domain = domain(args.server.as_deref());
    let removed = DockerConfig::load()?.erase(&domain)?;
    terminal::print(&match removed {
        true => format!("Removing login credentials for {domain}\n"),
        false => format!("Not logged in to {domain}\n"),
    })?;
    Ok(0)
}

#[derive(Debug, Deserialize)]
struct Found {
    name: String,
    description: String,
    star_count: i64,
    is_official: bool,
}

/// Searches for repositories.
pub(super) async fn search(home: &Home, args: &SearchArgs) -> Outcome {
    let docker = client::connect(home).await?;
    let mut path = format!("/images/search?term={}&limit={}", escape(&args.term), args.limit);
    let mut filters: std::collections::BTreeMap<&str, Vec<&str>> = std::collections::BTreeMap::new();
    for filter in &args.filter {
        let (name, value) = filter.split_once('=').ok_or_else(|| {
            Failure::new(format_args!("invalid argument \"{filter}\": a filter is KEY=VALUE"))
        })?;
        filters.entry(name).or_default().push(value);
    }
    if !filters.is_empty() {
        let json = serde_json::to_string(&filters).context("cannot write the filters as JSON")?;
        path += &format!("&filters={}", escape(&json));
    }
    let first = args.term.split('/').next().unwrap_or_default();
    let is_host = args.term.contains('/') && (first == "localhost" || first.contains(['.', ':']));
    let login = DockerConfig::load()?.login(if is_host { first } else { "docker.io" })?;
    let response = docker.call_as(Method::GET, &path, login.as_ref(), client::empty()).await?;
    let body = response.into_body().collect().await.context("lost the connection to the daemon")?.to_bytes();
    let found: Vec<Found> = serde_json::from_slice(&body).context("cannot understand the daemon's answer")?;
    let mut table = Table::new(&["NAME", "DESCRIPTION", "STARS", "OFFICIAL"]);
    for one in found {
        let description = match args.no_trunc || one.description.chars().count() <= DESCRIPTION {
            true => one.description,
            false => one.description.chars().take(DESCRIPTION - 1).chain(['…']).collect(),
        };
        let official = if one.is_official { "[OK]" } else { "" };
        table.row([one.name, description, one.star_count.to_string(), official.to_owned()]);
    }
    terminal::print(&table.render())?;
    Ok(0)
}
