//! What a filter decides about each call of one architecture, found out from its rules.

use std::collections::BTreeMap;

use coracle_agent_api::{SeccompAction, SeccompArgument};

use super::numbers::Architecture;

/// A rule that applies to the container.
pub(super) struct Rule<'a> {
    pub names: Vec<&'a str>,
    pub action: SeccompAction,
    /// All must be true.
    pub arguments: Vec<SeccompArgument>,
}

/// What is decided about one call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Decision {
    Always(SeccompAction),
    /// The first whose conditions are all true; else the default.
    ByArguments(Vec<(Vec<SeccompArgument>, SeccompAction)>),
}

/// The decisions of one architecture, by the call's number; the default for all others.
pub(super) fn decide(
    architecture: &Architecture,
    rules: &[Rule<'_>],
    default: SeccompAction,
) -> BTreeMap<u32, Decision> {
    let mut decisions = BTreeMap::new();
    for rule in rules.iter().filter(|rule| rule.action != default) {
        for number in rule.names.iter().filter_map(|name| (architecture.number)(name)) {
            add(&mut decisions, number, rule);
        }
    }
    decisions
}

fn add(decisions: &mut BTreeMap<u32, Decision>, number: u32, rule: &Rule<'_>) {
    if rule.arguments.is_empty() {
        // Without conditions it is about more than any rule with some; the first one stays.
        if !matches!(decisions.get(&number), Some(Decision::Always(_))) {
            decisions.insert(number, Decision::Always(rule.action));
        }
        return;
    }
    let decision = decisions.entry(number).or_insert_with(|| Decision::ByArguments(Vec::new()));
    if let Decision::ByArguments(cases) = decision {
        cases.push((rule.arguments.clone(), rule.action));
    }
}
