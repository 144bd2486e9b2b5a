//! Patterns for names as Go's `path.Match` has them: `*` and `?` for anything but a slash, `[a-z]` and `[^a-z]` for one of
//! some characters, a backslash before what is meant literally. Patterns come from clients: no pattern takes long.

/// Whether the whole text fits. A malformed pattern fits nothing.
pub(crate) fn fits(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    // Greedy, with one point to come back to: a later star makes earlier ones' choices irrelevant.
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        if pattern.get(p) == Some(&'*') {
            p += 1;
            star = Some((p, t));
            continue;
        }
        if let Some(length) = one(&pattern[p.min(pattern.len())..], text[t]) {
            p += length;
            t += 1;
            continue;
        }
        match star {
            Some((after, from)) if text[from] != '/' => {
                p = after;
                t = from + 1;
                star = Some((after, from + 1));
            }
            _ => return false,
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

/// How much of the pattern's start fits this one character.
fn one(pattern: &[char], c: char) -> Option<usize> {
    match *pattern.first()? {
        '?' => (c != '/').then_some(1),
        '\\' => (*pattern.get(1)? == c).then_some(2),
        '[' => class(pattern, c),
        other => (other == c).then_some(1),
    }
}

fn class(pattern: &[char], c: char) -> Option<usize> {
    let negated = pattern.get(1) == Some(&'^');
    let mut at = if negated { 2 } else { 1 };
    let mut found = false;
    let mut is_first = true;
    while is_first || *pattern.get(at)? != ']' {
        is_first = false;
        let (low, after) = member(pattern, at)?;
        let (high, after) = match pattern.get(after) {
            Some('-') => member(pattern, after + 1)?,
            _ => (low, after),
        };
        found |= (low..=high).contains(&c);
        at = after;
    }
    (found != negated && c != '/').then_some(at + 1)
}

fn member(pattern: &[char], at: usize) -> Option<(char, usize)> {
    match *pattern.get(at)? {
        '\\' => Some((*pattern.get(at + 1)?, at + 2)),
        '-' | ']' => None,
        c => Some((c, at + 1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_fit_as_gos_do() {
        for (pattern, text, expected) in [
            ("abc", "abc", true),
            ("*", "abc", true),
            ("*c", "abc", true),
            ("a*", "ab/c", false),
            ("a*/b", "a/c/b", false),
            ("a*b*c*d*e*/f", "axbxcxdxexxx/f", true),
            ("a*b?c*x", "abxbbxdbxebxczzx", true),
            ("a*b?c*x", "abxbbxdbxebxczzy", false),
            ("ab[c]", "abc", true),
            ("ab[b-d]", "abc", true),
            ("ab[^c]", "abc", false),
            ("a?b", "a/b", false),
            ("[a-]", "a", false),
            ("[", "a", false),
            ("a[", "a", false),
            ("\\*", "*", true),
            ("", "", true),
            ("", "a", false),
            ("a", "", false),
        ] {
            assert_eq!(fits(pattern, text), expected, "{pattern} {text}");
        }
        assert!(!fits("*a*a*a*a*a*b", &"a".repeat(10_000)));
    }
}
