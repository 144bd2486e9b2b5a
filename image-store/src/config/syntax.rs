//! Words of Dockerfile instructions: lines with continuations, quotes, `NAME=VALUE` pairs, variables, Go's durations.

/// Lines without comments and blank ones; a backslash at a line's end joins it with the next.
pub(super) fn logical_lines(text: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let mut joined: Option<String> = None;
    for line in text.lines() {
        if line.trim_start().starts_with('#') || (line.trim().is_empty() && joined.is_none()) {
            continue;
        }
        let mut whole = joined.take().unwrap_or_default();
        let trimmed = line.trim_end();
        match trimmed.strip_suffix('\\') {
            Some(start) => {
                whole.push_str(start);
                joined = Some(whole);
            }
            None => {
                whole.push_str(trimmed);
                lines.push(whole.trim().to_owned());
            }
        }
    }
    lines.extend(joined.map(|line| line.trim().to_owned()));
    lines.retain(|line| !line.is_empty());
    lines
}

/// A JSON list of strings, if it is one.
pub(super) fn json_list(text: &str) -> Option<Vec<String>> {
    if text.starts_with('[') { serde_json::from_str(text).ok() } else { None }
}

/// Words at blanks; quotes and backslashes keep blanks, and stay for [`expand`].
pub(super) fn split(text: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quote = None;
    let mut characters = text.chars();
    while let Some(c) = characters.next() {
        match (quote, c) {
            (None, c) if c.is_ascii_whitespace() => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                continue;
            }
            (None | Some('"'), '\\') => {
                word.push(c);
                word.extend(characters.next());
                continue;
            }
            (None, '"' | '\'') => quote = Some(c),
            (Some(open), c) if open == c => quote = None,
            _ => {}
        }
        word.push(c);
    }
    if quote.is_some() {
        return Err("a quote is not closed".to_owned());
    }
    if !word.is_empty() {
        words.push(word);
    }
    Ok(words)
}

/// `A=1 B=2`, or the old form `A the rest of the line`.
pub(super) fn pairs(text: &str) -> Result<Vec<(String, String)>, String> {
    let words = split(text)?;
    let first = words.first().ok_or("it requires at least one argument")?;
    if !first.contains('=') {
        let (name, value) = text.split_once(|c: char| c.is_ascii_whitespace()).unwrap_or((text, ""));
        let value = value.trim();
        return match value {
            "" => Err("it must have two arguments".to_owned()),
            _ => Ok(vec![(name.to_owned(), value.to_owned())]),
        };
    }
    let pair = |word: &String| match word.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        Some(_) => Err("a name is blank".to_owned()),
        None => Err(format!("can't find = in {word:?}; it must be of the form: name=value")),
    };
    words.iter().map(pair).collect()
}

/// Takes quotes and backslashes away and puts variables in: `$NAME`, `${NAME}`, `${NAME:-word}`, `${NAME:+word}`.
pub(super) fn expand(text: &str, env: &[String]) -> Result<String, String> {
    let mut expanded = String::new();
    let mut quote = None;
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        rest = &rest[c.len_utf8()..];
        match (quote, c) {
            (Some('\''), '\'') => quote = None,
            (Some('\''), c) => expanded.push(c),
            (Some('"'), '"') => quote = None,
            (None, '"' | '\'') => quote = Some(c),
            (_, '\\') => match rest.chars().next() {
                // In double quotes a backslash is one unless it hides something.
                Some(next) if quote.is_none() || matches!(next, '"' | '$' | '\\') => {
                    expanded.push(next);
                    rest = &rest[next.len_utf8()..];
                }
                _ => expanded.push('\\'),
            },
            (_, '$') => {
                let (value, after) = variable(rest, env)?;
                expanded.push_str(&value);
                rest = after;
            }
            (_, c) => expanded.push(c),
        }
    }
    if quote.is_some() { Err("a quote is not closed".to_owned()) } else { Ok(expanded) }
}

/// What stands behind a `$`: the variable's value, and what follows it.
fn variable<'a>(text: &'a str, env: &[String]) -> Result<(String, &'a str), String> {
    let value_of = |name: &str| {
        let is_it = |setting: &&String| setting.split_once('=').is_some_and(|(known, _)| known == name);
        env.iter().rev().find(is_it).and_then(|setting| setting.split_once('=')).map(|(_, value)| value)
    };
    let name_length = |text: &str| {
        let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        end.unwrap_or(text.len())
    };
    let Some(braced) = text.strip_prefix('{') else {
        let length = name_length(text);
        return Ok(match length {
            0 => ("$".to_owned(), text),
            _ => (value_of(&text[..length]).unwrap_or_default().to_owned(), &text[length..]),
        });
    };
    let (inside, after) = braced.split_once('}').ok_or("a `${` is not closed")?;
    let (name, modifier) = inside.split_at(name_length(inside));
    if name.is_empty() {
        return Err("a `${}` has no name".to_owned());
    }
    let value = value_of(name).filter(|value| !value.is_empty() || !modifier.starts_with(':'));
    let value = match modifier.trim_start_matches(':').split_at_checked(1) {
        None if modifier.is_empty() => value.unwrap_or_default(),
        Some(("-", word)) => value.unwrap_or(word),
        Some(("+", word)) => value.map_or("", |_| word),
        _ => return Err(format!("unsupported modifier ({modifier}) in substitution")),
    };
    Ok((value.to_owned(), after))
}

/// Nanoseconds of a duration as Go writes it: `1m30s`, `500ms`, `0`.
pub(super) fn duration(text: &str) -> Result<u64, String> {
    let bad = || format!("invalid duration {:?}", text.chars().take(40).collect::<String>());
    if text == "0" {
        return Ok(0);
    }
    let mut total = 0f64;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(bad)?;
        let number: f64 = rest[..digits].parse().map_err(|_| bad())?;
        let unit = rest[digits..]
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .map_or(rest.len(), |at| digits + at);
        let nanoseconds = match &rest[digits..unit] {
            "h" => 3.6e12,
            "m" => 6e10,
            "s" => 1e9,
            "ms" => 1e6,
            "us" | "µs" => 1e3,
            "ns" => 1.0,
            _ => return Err(bad()),
        };
        total += number * nanoseconds;
        rest = &rest[unit..];
    }
    if (0.0..9e18).contains(&total) && !text.is_empty() { Ok(total as u64) } else { Err(bad()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_gos() {
        for (text, nanoseconds) in
            [("0", 0), ("1s", 1_000_000_000), ("1m30s", 90_000_000_000), ("1.5ms", 1_500_000)]
        {
            assert_eq!(duration(text), Ok(nanoseconds), "{text}");
        }
        for bad in ["", "1", "s", "1x", "-1s", "999999999999h"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn quotes_and_backslashes_are_taken_away() {
        let env = ["A=1".to_owned()];
        for (text, expanded) in [
            ("$A${A}b", "11b"),
            ("'$A'", "$A"),
            (r#""$A \" \x""#, r#"1 " \x"#),
            (r"\$A\ b", "$A b"),
            ("$", "$"),
            ("${B:-x}", "x"),
            ("${A:+y}", "y"),
            ("${B-x}${B+y}", "x"),
        ] {
            assert_eq!(expand(text, &env).as_deref(), Ok(expanded), "{text}");
        }
    }
}
