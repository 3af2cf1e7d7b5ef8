// SPDX-License-Identifier: Apache-2.0

//! The order of versions (the UAPI group's "Version Format Specification").

use std::cmp::Ordering;

/// Compares two versions.
pub(crate) fn compare(one: &str, other: &str) -> Ordering {
    let (mut one, mut other) = (one, other);
    'next: loop {
        one = one.trim_start_matches(is_ignored);
        other = other.trim_start_matches(is_ignored);
        // A tilde marks a version before the one that ends here; the other signs, one behind it.
        for sign in ['~', '-', '^', '.'] {
            if sign != '~' && (one.is_empty() || other.is_empty()) {
                return one.len().cmp(&other.len());
            }
            match (one.strip_prefix(sign), other.strip_prefix(sign)) {
                (Some(a), Some(b)) => {
                    (one, other) = (a, b);
                    continue 'next;
                }
                (Some(_), None) => return Ordering::Less,
                (None, Some(_)) => return Ordering::Greater,
                (None, None) => {}
            }
        }
        let is_number = |text: &str| text.starts_with(|c: char| c.is_ascii_digit());
        let order = if is_number(one) || is_number(other) {
            let (a, b) = (split(&mut one, char::is_ascii_digit), split(&mut other, char::is_ascii_digit));
            let (a, b) = (a.trim_start_matches('0'), b.trim_start_matches('0'));
            a.len().cmp(&b.len()).then_with(|| a.cmp(b))
        } else {
            split(&mut one, char::is_ascii_alphabetic).cmp(split(&mut other, char::is_ascii_alphabetic))
        };
        if order != Ordering::Equal {
            return order;
        }
    }
}

/// Other signs separate, and no more.
fn is_ignored(c: char) -> bool {
    !c.is_ascii_alphanumeric() && !matches!(c, '~' | '-' | '^' | '.')
}

/// Takes the beginning of a text.
fn split<'a>(text: &mut &'a str, inside: fn(&char) -> bool) -> &'a str {
    let (begin, rest) = text.split_at(text.find(|c: char| !inside(&c)).unwrap_or(text.len()));
    *text = rest;
    begin
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_have_the_order_of_the_specification() {
        // Each is less than the next.
        for ordered in [
            &[
                "122.1",
                "123~rc1-1",
                "123",
                "123-a",
                "123-a.1",
                "123-1",
                "123-1.1",
                "123^post1",
                "123.a-1",
                "123.1-1",
                "123a-1",
                "124-1",
            ][..],
            &["", "11"],
            &["vmlinuz-6.1.0-9-amd64", "vmlinuz-6.1.0-13-amd64", "vmlinuz-6.12.0-1-amd64"],
            &["1~~", "1~", "1"],
        ] {
            for pair in ordered.windows(2) {
                assert_eq!(compare(pair[0], pair[1]), Ordering::Less, "{pair:?}");
                assert_eq!(compare(pair[1], pair[0]), Ordering::Greater, "{pair:?}");
            }
        }
        for (one, other) in [("1.2", "1.2"), ("1_2", "1!2"), ("007", "7")] {
            assert_eq!(compare(one, other), Ordering::Equal, "{one} {other}");
        }
    }
}
