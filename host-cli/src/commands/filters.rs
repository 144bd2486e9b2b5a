//! `--filter KEY=VALUE` as the API takes it.

use std::collections::BTreeMap;

use crate::{client::escape, failure::Failure};

/// Filters under construction.
#[derive(Debug, Default)]
pub(super) struct Filters(BTreeMap<String, Vec<String>>);

impl Filters {
    /// From the command line.
    pub(super) fn of(given: &[String]) -> Result<Self, Failure> {
        let mut filters = Self::default();
        for filter in given {
            // `label!=x` is the filter `label!`.
            let Some((key, value)) = filter.split_once('=') else {
                return Err(Failure::new(format_args!(
                    "cannot use the filter `{filter}`: expected KEY=VALUE"
                )));
            };
            filters.add(key.trim(), value.trim());
        }
        Ok(filters)
    }

    /// Adds a value.
    pub(super) fn add(&mut self, key: &str, value: &str) {
        self.0.entry(key.to_ascii_lowercase()).or_default().push(value.to_owned());
    }

    /// As the value of a query's parameter.
    pub(super) fn query(&self) -> String {
        escape(&serde_json::json!(self.0).to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_collected_by_name() {
        let given = ["label=a=1", "label=b", "label!=c"].map(str::to_owned);
        let filters = Filters::of(&given).unwrap();
        assert_eq!(filters.0["label"], ["a=1", "b"]);
        assert_eq!(filters.0["label!"], ["c"]);
        assert!(Filters::of(&["dangling".to_owned()]).is_err());
    }
}
