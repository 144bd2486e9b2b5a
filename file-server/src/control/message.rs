//! The messages of the control protocol. They are plain serde types that refuse unknown fields.

use std::fmt;

use coracle_worker::control;
use serde::{Deserialize, Serialize};

/// What a client sends.
pub type FromClient = control::FromClient<Request>;
/// The reply to it.
pub type Reply = control::Reply<Answer>;
/// How a request went.
pub type Outcome = control::Outcome<Answer>;

/// A request. The descriptors that belong to it travel with the same message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Serve a machine. Descriptor: a connected `SOCK_STREAM` unix socket whose other end is the VMM's vhost-user frontend. A server serves
    /// one machine and ends when that socket is closed.
    Serve,
    /// Open a tree. Descriptor: the directory or file, opened with `O_PATH`.
    Grant(Grant),
    /// Close a tree.
    Revoke(Revoke),
    /// Report what is served.
    Status,
}

impl Request {
    /// How many descriptors must come with this request.
    pub fn expected_fds(&self) -> usize {
        match self {
            Self::Serve | Self::Grant(_) => 1,
            Self::Revoke(_) | Self::Status => 0,
        }
    }
}

/// A tree of the host that the machine may use: its root is found under the name `id` in the exported file system's root,
/// which lists nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    /// Its name. It may be granted already if all is the same, and the file; then nothing changes.
    pub id: GrantId,
    /// What the descriptor must be.
    pub kind: GrantKind,
    /// Whether changes are refused.
    pub read_only: bool,
    /// Whom the files belong to; the same for all grants of a server.
    pub owners: Owners,
}

/// What is granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GrantKind {
    /// A directory and all beneath it.
    Directory,
    /// One regular file.
    File,
}

/// How owners on the host and owners inside are related.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Owners {
    /// As they are. Only for a server that runs as root.
    Real,
    /// What is made inside belongs to the server's user on the host. The owner, mode and device number asked for inside are kept in the extended
    /// attribute `user.coracle.stat` and shown inside. Files of the server's user without it are shown as `uid`:`gid`, those of other users
    /// as 65534 (nobody).
    Kept {
        /// User id inside of files that belong to the server's user.
        uid: u32,
        /// Group id inside of files that belong to the server's user.
        gid: u32,
    },
}

/// The tree to close. What the machine still has open of it is closed; its entries answer ESTALE from then on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Revoke {
    /// Its name.
    pub id: GrantId,
}

/// The name of a grant: 1 to 128 letters, digits, `-`, `_` and `.`, beginning with a letter or digit.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GrantId(String);

/// A name that no grant can have.
#[derive(Debug, thiserror::Error)]
#[error("a grant's name is 1 to 128 letters, digits, '-', '_' and '.', beginning with a letter or digit")]
pub struct InvalidGrantId;

impl GrantId {
    /// The longest name in bytes.
    pub const MAX_LEN: usize = 128;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for GrantId {
    type Error = InvalidGrantId;

    fn try_from(text: String) -> Result<Self, InvalidGrantId> {
        let valid = (1..=Self::MAX_LEN).contains(&text.len())
            && text.starts_with(|first: char| first.is_ascii_alphanumeric())
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
        if valid { Ok(Self(text)) } else { Err(InvalidGrantId) }
    }
}

impl From<GrantId> for String {
    fn from(id: GrantId) -> Self {
        id.0
    }
}

impl fmt::Display for GrantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a request gives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Nothing but that it is done.
    Done,
    /// The answer to [`Request::Status`].
    Status(Status),
}

/// What a server serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Whether it serves a machine.
    pub serving: bool,
    /// Whether it has left the host's namespaces, so that it sees no paths of the host. Some hosts do not allow that.
    #[serde(default)]
    pub namespaces: bool,
    /// Its grants, in order of their names.
    pub grants: Vec<Grant>,
    /// Files and directories that the machine holds references to.
    pub nodes: u64,
    /// Files and directories that the machine has open.
    pub open: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_mean_a_path_are_refused() {
        let refuse = ["", ".", "..", ".a", "a/b", "a\0b", "ä", "-x"];
        for text in refuse.map(String::from).into_iter().chain(["x".repeat(GrantId::MAX_LEN + 1)]) {
            assert!(GrantId::try_from(text.clone()).is_err(), "{text:?}");
            let json = serde_json::to_string(&text).unwrap();
            assert!(serde_json::from_str::<GrantId>(&json).is_err(), "{text:?}");
        }
        assert_eq!(GrantId::try_from("0a-b_c.d".to_owned()).unwrap().as_str(), "0a-b_c.d");
    }

    #[test]
    fn a_grant_reads_as_written_and_unknown_fields_are_refused() {
        let text = r#"{"id":3,"request":{"grant":{"id":"a","kind":"directory","read_only":false,"owners":{"kept":{"uid":0,"gid":0}}}}}"#;
        let message: FromClient = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&message).unwrap(), text);
        assert!(serde_json::from_str::<FromClient>(&text.replace("read_only", "readonly")).is_err());
        assert!(serde_json::from_str::<FromClient>(&text.replace("\"gid\":0", "\"gid\":0,\"x\":1")).is_err());
        assert!(serde_json::from_str::<FromClient>(r#"{"id":1,"request":"serve"}"#).is_ok());
    }
}
