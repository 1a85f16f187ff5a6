//! Glob patterns over the names of settings and commands: short texts, any case.

/// Whether the whole of `text` matches, without regard to case: `*`, `?`, `[a-z]`, `[^a]` and `\` as in Redis. Iterative: a mismatch goes
/// back to the last star only.
pub fn matches_in_any_case(pattern: &[u8], text: &[u8]) -> bool {
    let (mut pattern_at, mut text_at) = (0, 0);
    // Where to go on after the last star: the pattern behind it, and the text that it has not taken yet.
    let mut retry: Option<(usize, usize)> = None;
    while text_at < text.len() {
        if pattern.get(pattern_at) == Some(&b'*') {
            pattern_at += 1;
            retry = Some((pattern_at, text_at));
            continue;
        }
        if let Some(length) = matches_one(&pattern[pattern_at..], text[text_at]) {
            pattern_at += length;
            text_at += 1;
            continue;
        }
        let Some((behind_star, taken)) = retry else {
            return false;
        };
        (pattern_at, text_at) = (behind_star, taken + 1);
        retry = Some((behind_star, taken + 1));
    }
    pattern[pattern_at..].iter().all(|byte| *byte == b'*')
}

/// Length of the pattern's first element if it matches the byte.
fn matches_one(pattern: &[u8], byte: u8) -> Option<usize> {
    let equal = |a: u8, b: u8| a.eq_ignore_ascii_case(&b);
    match pattern {
        [] => None,
        [b'?', ..] => Some(1),
        [b'\\', escaped, ..] => equal(*escaped, byte).then_some(2),
        [b'[', class @ ..] => {
            let (negated, mut at) = if class.first() == Some(&b'^') { (true, 1) } else { (false, 0) };
            let mut found = false;
            let byte = byte.to_ascii_lowercase();
            loop {
                match &class[at.min(class.len())..] {
                    // An open class ends with the pattern.
                    [] => break,
                    [b']', ..] => {
                        at += 1;
                        break;
                    }
                    [b'\\', escaped, ..] => {
                        found |= equal(*escaped, byte);
                        at += 2;
                    }
                    [from, b'-', to, ..] => {
                        let (from, to) = (from.to_ascii_lowercase(), to.to_ascii_lowercase());
                        found |= (from.min(to)..=from.max(to)).contains(&byte);
                        at += 3;
                    }
                    [single, ..] => {
                        found |= equal(*single, byte);
                        at += 1;
                    }
                }
            }
            (found != negated).then_some(1 + at)
        }
        [literal, ..] => equal(*literal, byte).then_some(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_in_redis() {
        for (pattern, text, matches) in [
            ("*", "", true),
            ("", "", true),
            ("", "a", false),
            ("H?", "hz", true),
            ("h?", "h", false),
            ("*max*len*", "slowlog-max-len", true),
            ("*max*len", "slowlog-max-length", false),
            ("[g-i]Z", "hz", true),
            ("[i-g]z", "hz", true),
            ("[^h]z", "hz", false),
            ("[h", "h", true),
            ("\\h\\Z", "hz", true),
            ("[\\h]z", "hz", true),
            ("a**b", "ab", true),
            ("a*b*c", "abxbxd", false),
        ] {
            assert_eq!(matches_in_any_case(pattern.as_bytes(), text.as_bytes()), matches, "{pattern:?} {text:?}");
        }
    }

    #[test]
    fn many_stars_are_quick() {
        let pattern = "*a".repeat(100) + "b";
        assert!(!matches_in_any_case(pattern.as_bytes(), "a".repeat(2000).as_bytes()));
    }
}
