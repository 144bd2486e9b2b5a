//! The `filters` of lists, prunes and events: a JSON object from names to values, in both of Docker's forms.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::query::Query;
use crate::error::{Error, Result};

/// Values by filter name.
#[derive(Debug, Default)]
pub(crate) struct Filters(BTreeMap<String, Vec<String>>);

#[derive(Deserialize)]
#[serde(untagged)]
enum Values {
    List(Vec<String>),
    Set(BTreeMap<String, bool>),
}

impl Filters {
    /// The filters of a query, all of which must be known.
    pub(crate) fn of(query: &Query, known: &[&str]) -> Result<Self> {
        let filters = query.get("filters").map_or_else(|| Ok(Self::default()), Self::parse)?;
        match filters.0.keys().find(|name| !known.contains(&name.as_str())) {
            Some(unknown) => Err(Error::invalid(format!(
                "invalid filter '{}'",
                unknown.chars().take(60).collect::<String>()
            ))),
            None => Ok(filters),
        }
    }

    pub(crate) fn parse(json: &str) -> Result<Self> {
        let values: BTreeMap<String, Values> = serde_json::from_str(json)
            .map_err(|error| Error::invalid(format!("invalid filters: {error}")))?;
        let list = |values| match values {
            Values::List(list) => list,
            Values::Set(set) => set.into_iter().filter(|(_, on)| *on).map(|(value, _)| value).collect(),
        };
        Ok(Self(values.into_iter().map(|(name, values)| (name, list(values))).collect()))
    }

    /// The values of a filter; empty if it was not given.
    pub(crate) fn values(&self, name: &str) -> &[String] {
        self.0.get(name).map_or(&[], Vec::as_slice)
    }

    /// Whether one of a filter's values fits; true if it was not given.
    pub(crate) fn any(&self, name: &str, fits: impl FnMut(&str) -> bool) -> bool {
        let values = self.values(name);
        values.is_empty() || values.iter().map(String::as_str).any(fits)
    }

    /// Whether all values (`NAME` or `NAME=VALUE`) of a filter are among the labels.
    pub(crate) fn labels<'a>(&self, name: &str, label: impl Fn(&str) -> Option<&'a str>) -> bool {
        self.values(name).iter().all(|wanted| match wanted.split_once('=') {
            Some((name, value)) => label(name) == Some(value),
            None => label(wanted).is_some(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_are_read() {
        for json in [r#"{"status":["exited"]}"#, r#"{"status":{"exited":true,"created":false}}"#] {
            assert_eq!(Filters::parse(json).unwrap().values("status"), ["exited"], "{json}");
        }
        for bad in ["", "[]", r#"{"a":1}"#, r#"{"a":[1]}"#] {
            assert!(Filters::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn labels_must_all_fit() {
        let labels = BTreeMap::from([("a", "1"), ("b", "2")]);
        let fits =
            |json: &str| Filters::parse(json).unwrap().labels("label", |name| labels.get(name).copied());
        assert!(fits(r#"{"label":["a","b=2"]}"#));
        assert!(!fits(r#"{"label":["a","b=3"]}"#));
        assert!(!fits(r#"{"label":["c"]}"#));
    }
}
