//! Names that cross the wire and become paths: they are checked when they are made, also when they are deserialized.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Why a string is no id.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is not an id: expected 64 lower-case hexadecimal digits")]
pub struct IdError(String);

macro_rules! hex_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The 64 hexadecimal digits.
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// The first twelve digits, for people.
            pub fn short(&self) -> &str {
                &self.0[..12]
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;

            fn try_from(text: String) -> Result<Self, IdError> {
                let legal = text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
                if legal { Ok(Self(text)) } else { Err(IdError(text.chars().take(80).collect())) }
            }
        }

        impl std::str::FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                Self::try_from(text.to_owned())
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

hex_id! {
    /// A container's first process (then it is the container's id) or an exec.
    ProcessId
}
hex_id! {
    /// The SHA-256 of a layer's uncompressed tar stream, without the `sha256:`.
    DiffId
}

hex_id! {
    /// A volume. It is not the volume's name: one that was removed and made again under its old name is another one.
    VolumeId
}

hex_id! {
    /// A network. As with volumes, it is not the network's name.
    NetworkId
}

/// The name of a tree of the host that a sandbox was granted: 1 to 128 letters, digits, `-`, `_` and `.`, beginning with a letter or
/// digit, so that it can be a directory entry.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TreeName(String);

/// Why a string is no [`TreeName`].
#[derive(Debug, thiserror::Error)]
#[error(
    "`{0}` is no name of a tree: expected 1 to 128 letters, digits, `-`, `_` and `.`, beginning with a letter or digit"
)]
pub struct TreeNameError(String);

impl TreeName {
    /// The longest name in bytes.
    pub const MAX_LEN: usize = 128;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for TreeName {
    type Error = TreeNameError;

    fn try_from(text: String) -> Result<Self, TreeNameError> {
        let legal = (1..=Self::MAX_LEN).contains(&text.len())
            && text.starts_with(|first: char| first.is_ascii_alphanumeric())
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
        if legal { Ok(Self(text)) } else { Err(TreeNameError(text.chars().take(80).collect())) }
    }
}

impl std::str::FromStr for TreeName {
    type Err = TreeNameError;

    fn from_str(text: &str) -> Result<Self, TreeNameError> {
        Self::try_from(text.to_owned())
    }
}

impl From<TreeName> for String {
    fn from(name: TreeName) -> String {
        name.0
    }
}

impl fmt::Display for TreeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_has_no_name_that_could_mean_a_path() {
        for bad in ["", ".", "..", ".a", "a/b", "a\0b", "ä", "-x", &"x".repeat(TreeName::MAX_LEN + 1)] {
            assert!(bad.parse::<TreeName>().is_err(), "{bad:?}");
            let json = serde_json::to_string(bad).unwrap();
            assert!(serde_json::from_str::<TreeName>(&json).is_err(), "{bad:?}");
        }
        assert_eq!("0a-b_c.d".parse::<TreeName>().unwrap().as_str(), "0a-b_c.d");
    }

    #[test]
    fn only_64_lower_case_hex_digits_are_an_id() {
        assert!("a".repeat(64).parse::<ProcessId>().is_ok());
        for bad in ["", "a", &"A".repeat(64), &"g".repeat(64), &"a".repeat(65), &"../".repeat(21)] {
            assert!(bad.parse::<ProcessId>().is_err(), "{bad}");
        }
        assert!(serde_json::from_str::<DiffId>("\"../../etc\"").is_err());
    }
}
