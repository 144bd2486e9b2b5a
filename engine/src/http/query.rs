//! A request's query string.

use std::str::FromStr;

use crate::error::{Error, Result};

/// Names and values, as they came.
#[derive(Debug, Default)]
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let pairs = serde_urlencoded::from_str(text)
            .map_err(|error| Error::invalid(format!("cannot read the query: {error}")))?;
        Ok(Self(pairs))
    }

    /// The first value of a name, unless it is empty.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        let value = self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str());
        value.filter(|value| !value.is_empty())
    }

    /// All values of a name.
    pub(crate) fn all(&self, name: &str) -> impl Iterator<Item = &str> {
        self.0.iter().filter(move |(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Docker's idea of truth.
    pub(crate) fn flag(&self, name: &str) -> bool {
        self.flag_or(name, false)
    }

    /// Docker's idea of truth, with a default for what is not there.
    pub(crate) fn flag_or(&self, name: &str, default: bool) -> bool {
        match self.0.iter().find(|(known, _)| known == name) {
            Some((_, value)) => {
                !matches!(value.trim().to_ascii_lowercase().as_str(), "" | "0" | "no" | "false" | "none")
            }
            None => default,
        }
    }

    /// A number, if it is there.
    pub(crate) fn number<T: FromStr>(&self, name: &str) -> Result<Option<T>> {
        let parse = |text: &str| {
            let shown: String = text.chars().take(40).collect();
            text.parse().map_err(|_| {
                Error::invalid(format!("the value of `{name}` is not a number in range: {shown}"))
            })
        };
        self.get(name).map(parse).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_read_as_docker_reads_them() {
        let query = Query::parse("a=1&b=true&c=0&d=&e=none&f=False&g=x").unwrap();
        for yes in ["a", "b", "g"] {
            assert!(query.flag(yes), "{yes}");
        }
        for no in ["c", "d", "e", "f", "missing"] {
            assert!(!query.flag(no), "{no}");
        }
        assert!(query.flag_or("missing", true));
        assert_eq!(query.number::<i64>("a").unwrap(), Some(1));
        assert!(query.number::<i64>("b").is_err());
        assert_eq!(query.number::<i64>("missing").unwrap(), None);
    }
}
