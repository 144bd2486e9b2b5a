//! Who the person is at registries: `config.json` of the docker CLI and its credential helpers, read and written as the
//! docker CLI does, so that a login with either counts for both.

use std::{
    io::{self, Write},
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{docker_context, files};

/// Under which Docker Hub's credentials are kept.
const HUB_KEY: &str = "https://index.docker.io/v1/";
/// The user name that stands for a token.
const TOKEN_USER: &str = "<token>";

/// What is sent to the daemon as `X-Registry-Auth`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Login {
    pub(crate) username: String,
    pub(crate) password: String,
    pub(crate) identitytoken: String,
    pub(crate) serveraddress: String,
}

/// The docker CLI's configuration, with all that is in it.
#[derive(Debug)]
pub(crate) struct DockerConfig {
    path: Option<PathBuf>,
    content: Map<String, Value>,
}

impl DockerConfig {
    /// Reads it; it is empty where there is none.
    pub(crate) fn load() -> Result<Self> {
        match docker_context::config_folder() {
            Some(folder) => Self::load_from(folder.join("config.json")),
            None => Ok(Self { path: None, content: Map::new() }),
        }
    }

    fn load_from(path: PathBuf) -> Result<Self> {
        let cannot = || format!("cannot read {}", path.display());
        let content = match std::fs::read(&path) {
            Ok(bytes) if bytes.trim_ascii().is_empty() => Map::new(),
            Ok(bytes) => serde_json::from_slice(&bytes).with_context(cannot)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Map::new(),
            Err(error) => return Err(error).with_context(cannot),
        };
        Ok(Self { path: Some(path), content })
    }

    /// Who the person is at a registry.
    pub(crate) fn login(&self, domain: &str) -> Result<Option<Login>> {
        let key = key(domain);
        if let Some(helper) = self.helper(domain) {
            return Helper::new(helper)?.get(key);
        }
        let Some(auths) = self.content.get("auths").and_then(Value::as_object) else { return Ok(None) };
        let entry = auths.get(key).or_else(|| {
            let same = auths.iter().find(|(address, _)| host(address) == host(key));
            same.map(|(_, entry)| entry)
        });
        Ok(entry.and_then(|entry| from_entry(entry, key)))
    }

    /// Keeps a login; true if it lies in the file for all to read who can read the file.
    pub(crate) fn store(&mut self, domain: &str, login: &Login) -> Result<bool> {
        let key = key(domain);
        let helper = self.helper(domain).map(Helper::new).transpose()?;
        let entry = match &helper {
            Some(helper) => {
                helper.store(key, login)?;
                json!({})
            }
            None => to_entry(login),
        };
        let auths = self.content.entry("auths").or_insert_with(|| json!({}));
        let auths = auths.as_object_mut().context("`auths` in docker's config.json is no object")?;
        auths.insert(key.to_owned(), entry);
        self.save()?;
        Ok(helper.is_none())
    }

    /// Forgets a login; false if there was none.
    pub(crate) fn erase(&mut self, domain: &str) -> Result<bool> {
        let key = key(domain);
        let mut was_there = false;
        if let Some(helper) = self.helper(domain).map(Helper::new).transpose()? {
            was_there = helper.get(key)?.is_some();
            helper.erase(key)?;
        }
        if let Some(auths) = self.content.get_mut("auths").and_then(Value::as_object_mut) {
            let before = auths.len();
            auths.retain(|address, _| host(address) != host(key));
            was_there |= auths.len() < before;
        }
        if was_there {
            self.save()?;
        }
        Ok(was_there)
    }

    /// Where logins lie, to be shown.
    pub(crate) fn path(&self) -> String {
        self.path.as_ref().map_or_else(String::new, |path| path.display().to_string())
    }

    fn helper(&self, domain: &str) -> Option<&str> {
        let named = |name: &str| self.content.get("credHelpers")?.get(name)?.as_str();
        let own = named(domain).or_else(|| named(key(domain)));
        let name = own.or_else(|| self.content.get("credsStore").and_then(Value::as_str));
        name.filter(|name| !name.is_empty())
    }

    fn save(&self) -> Result<()> {
        let path = self.path.as_ref().context("neither DOCKER_CONFIG nor HOME is set")?;
        let cannot = || format!("cannot write {}", path.display());
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).with_context(cannot)?;
        }
        let text = serde_json::to_vec_pretty(&self.content).with_context(cannot)?;
        // A link stays one.
        let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.clone());
        files::replace(&path, &text).with_context(cannot)
    }
}

/// The address under which a registry's login is kept.
fn key(domain: &str) -> &str {
    if domain == "docker.io" { HUB_KEY } else { domain }
}

/// An address without scheme and path, of which old clients keep some.
fn host(address: &str) -> &str {
    let bare =
        address.strip_prefix("https://").or_else(|| address.strip_prefix("http://")).unwrap_or(address);
    bare.split('/').next().unwrap_or_default()
}

fn from_entry(entry: &Value, key: &str) -> Option<Login> {
    let text = |name: &str| entry.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    let decoded = STANDARD.decode(text("auth")).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    let (username, password) = match decoded.as_deref().and_then(|pair| pair.split_once(':')) {
        Some((username, password)) => (username.to_owned(), password.trim_end_matches('\0').to_owned()),
        None => (text("username"), text("password")),
    };
    let login =
        Login { username, password, identitytoken: text("identitytoken"), serveraddress: key.to_owned() };
    let is_empty = login.username.is_empty() && login.identitytoken.is_empty();
    (!is_empty).then_some(login)
}

fn to_entry(login: &Login) -> Value {
    // With a token the password is not kept.
    let password = if login.identitytoken.is_empty() { login.password.as_str() } else { "" };
    let auth = STANDARD.encode(format!("{}:{password}", login.username));
    match login.identitytoken.as_str() {
        "" => json!({ "auth": auth }),
        token => json!({ "auth": auth, "identitytoken": token }),
    }
}

/// A program `docker-credential-NAME`.
#[derive(Debug)]
struct Helper {
    program: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Kept {
    #[serde(rename = "ServerURL", default)]
    server_url: String,
    username: String,
    secret: String,
}

impl Helper {
    fn new(name: &str) -> Result<Self> {
        if name.contains(['/', '\\']) {
            bail!("docker's config.json names the credential helper `{name}`, which is no plain name");
        }
        Ok(Self { program: format!("docker-credential-{name}") })
    }

    fn get(&self, key: &str) -> Result<Option<Login>> {
        let (is_good, output) = self.run("get", key.as_bytes())?;
        if !is_good {
            // The protocol has no other way to say so.
            if output.contains("credentials not found") {
                return Ok(None);
            }
            bail!("{} cannot give the credentials for {key}: {}", self.program, output.trim());
        }
        let kept: Kept = serde_json::from_str(&output)
            .with_context(|| format!("cannot understand the answer of {}", self.program))?;
        let serveraddress = key.to_owned();
        let login = match kept.username.as_str() {
            TOKEN_USER => Login { identitytoken: kept.secret, serveraddress, ..Login::default() },
            _ => Login { username: kept.username, password: kept.secret, serveraddress, ..Login::default() },
        };
        Ok(Some(login))
    }

    fn store(&self, key: &str, login: &Login) -> Result<()> {
        let (username, secret) = match login.identitytoken.as_str() {
            "" => (login.username.clone(), login.password.clone()),
            token => (TOKEN_USER.to_owned(), token.to_owned()),
        };
        let kept = Kept { server_url: key.to_owned(), username, secret };
        self.must("store", &serde_json::to_vec(&kept)?)
    }

    fn erase(&self, key: &str) -> Result<()> {
        self.must("erase", key.as_bytes())
    }

    fn must(&self, action: &str, input: &[u8]) -> Result<()> {
        match self.run(action, input)? {
            (true, _) => Ok(()),
            (false, output) => bail!("{} cannot {action} the credentials: {}", self.program, output.trim()),
        }
    }

    fn run(&self, action: &str, input: &[u8]) -> Result<(bool, String)> {
        let cannot = || format!("cannot run the credential helper {}", self.program);
        let mut child = Command::new(&self.program)
            .arg(action)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(cannot)?;
        if let Some(mut stdin) = child.stdin.take() {
            // One that does not read its input says why by its exit.
            let _ = stdin.write_all(input);
        }
        let output = child.wait_with_output().with_context(cannot)?;
        Ok((output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(folder: &tempfile::TempDir, content: &Value) -> DockerConfig {
        let path = folder.path().join("config.json");
        std::fs::write(&path, content.to_string()).unwrap();
        DockerConfig::load_from(path).unwrap()
    }

    fn sailor() -> Login {
        Login { username: "sailor".to_owned(), password: "a:b".to_owned(), ..Login::default() }
    }

    #[test]
    fn a_login_is_kept_beside_what_else_is_there_and_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let mut ours = config(&folder, &json!({ "psFormat": "x" }));
        assert_eq!(ours.login("localhost:5000").unwrap(), None);
        assert!(ours.store("localhost:5000", &sailor()).unwrap());
        assert!(ours.store("docker.io", &sailor()).unwrap());
        let mut again = DockerConfig::load_from(folder.path().join("config.json")).unwrap();
        assert_eq!(again.content["psFormat"], "x");
        assert!(again.content["auths"].get(HUB_KEY).is_some());
        let found = again.login("localhost:5000").unwrap().unwrap();
        assert_eq!((found.username.as_str(), found.password.as_str()), ("sailor", "a:b"));
        assert!(again.erase("localhost:5000").unwrap());
        assert!(!again.erase("localhost:5000").unwrap());
        assert_eq!(again.login("localhost:5000").unwrap(), None);
        assert!(again.login("docker.io").unwrap().is_some());
    }

    #[test]
    fn addresses_of_old_clients_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let entry = json!({ "auth": STANDARD.encode("a:b") });
        let ours = config(&folder, &json!({ "auths": { "https://quay.io/v1/": entry } }));
        assert_eq!(ours.login("quay.io").unwrap().unwrap().username, "a");
        assert_eq!(ours.login("io").unwrap(), None);
    }

    #[test]
    fn a_token_is_kept_without_the_password() {
        let entry = to_entry(&Login { identitytoken: "t".to_owned(), ..sailor() });
        let read = from_entry(&entry, "x").unwrap();
        assert_eq!((read.password.as_str(), read.identitytoken.as_str()), ("", "t"));
    }

    #[test]
    fn a_helper_is_no_path() {
        assert!(Helper::new("../../bin/sh").is_err());
    }
}
