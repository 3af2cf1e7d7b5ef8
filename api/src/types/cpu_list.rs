// SPDX-License-Identifier: Apache-2.0

//! Lists of a host's CPUs.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{ObjectBuilder, RefOr, Schema, Type},
};

use super::Invalid;

/// The most CPUs of a Linux host on x86-64 (`NR_CPUS`).
pub const MAX_CPUS: u16 = 8192;
/// The longest list of a request in bytes.
const MAX_TEXT: usize = 4096;

/// CPUs of the host, at least one, as the kernel's lists have them: numbers from 0 to 8191 and ranges of them, such as `0-3,8`.
/// Other lists of the kernel, such as those of NUMA nodes, have the same form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CpuList(Vec<(u16, u16)>);

impl CpuList {
    /// The list of these ranges, which need no order and may overlap. None if there are none.
    #[must_use]
    pub fn of(mut ranges: Vec<(u16, u16)>) -> Option<Self> {
        ranges.sort_unstable();
        let mut list: Vec<(u16, u16)> = Vec::new();
        for (first, last) in ranges {
            match list.last_mut() {
                Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
                _ => list.push((first, last)),
            }
        }
        Some(Self(list)).filter(|list| !list.0.is_empty())
    }

    /// Reads a list of the kernel, of any length. None if it is empty or malformed.
    #[must_use]
    pub fn of_kernel(text: &str) -> Option<Self> {
        Self::of(text.trim().split(',').map(range).collect::<Option<Vec<_>>>()?)
    }

    /// Its ranges: first and last number, in their order, with gaps between them.
    #[must_use]
    pub fn ranges(&self) -> &[(u16, u16)] {
        &self.0
    }

    /// Whether it has this number.
    #[must_use]
    pub fn contains(&self, number: u16) -> bool {
        self.0.iter().any(|(first, last)| (*first..=*last).contains(&number))
    }

    /// The numbers of this list that `other` lacks. None if it has all.
    #[must_use]
    pub fn without(&self, other: &Self) -> Option<Self> {
        let numbers = self.0.iter().flat_map(|(first, last)| *first..=*last);
        Self::of(numbers.filter(|number| !other.contains(*number)).map(|number| (number, number)).collect())
    }

    /// The numbers of both lists.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        let both = self.0.iter().chain(&other.0).copied().collect();
        Self::of(both).unwrap_or_else(|| self.clone())
    }
}

/// Reads one number, or two with a hyphen.
fn range(text: &str) -> Option<(u16, u16)> {
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse().ok().filter(|number: &u16| digits && *number < MAX_CPUS)
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    Some((number(first)?, number(last)?)).filter(|(first, last)| first <= last)
}

impl FromStr for CpuList {
    type Err = Invalid;
    fn from_str(text: &str) -> Result<Self, Invalid> {
        if text.len() > MAX_TEXT {
            return Err(Invalid(format!("a list of CPUs has at most {MAX_TEXT} bytes")));
        }
        let wrong = || {
            let text: String = text.chars().take(40).collect();
            let last = MAX_CPUS - 1;
            Invalid(format!(
                "{text:?} is not a list of CPUs such as \"0-3,8\", with numbers from 0 to {last}"
            ))
        };
        Self::of_kernel(text).filter(|_| !text.contains(char::is_whitespace)).ok_or_else(wrong)
    }
}

impl TryFrom<String> for CpuList {
    type Error = Invalid;
    fn try_from(text: String) -> Result<Self, Invalid> {
        text.parse()
    }
}

impl From<CpuList> for String {
    fn from(list: CpuList) -> Self {
        list.to_string()
    }
}

impl fmt::Display for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, (first, last)) in self.0.iter().enumerate() {
            let comma = if n == 0 { "" } else { "," };
            match first == last {
                true => write!(f, "{comma}{first}")?,
                false => write!(f, "{comma}{first}-{last}")?,
            }
        }
        Ok(())
    }
}

impl PartialSchema for CpuList {
    fn schema() -> RefOr<Schema> {
        let text =
            "CPUs of the host, as the kernel's lists have them: numbers from 0 to 8191 and ranges of them.";
        let list = ObjectBuilder::new().schema_type(Type::String).description(Some(text));
        list.pattern(Some("^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$"))
            .max_length(Some(MAX_TEXT))
            .examples(["0-3,8"])
            .into()
    }
}

impl ToSchema for CpuList {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_the_kernel_writes_them() {
        for (text, written) in [
            ("4", "4"),
            ("4-7,9", "4-7,9"),
            ("9,4-5,6-7,5", "4-7,9"),
            ("0-8191", "0-8191"),
            ("3,2,1", "1-3"),
            ("0-5,2-3", "0-5"),
        ] {
            assert_eq!(text.parse::<CpuList>().unwrap().to_string(), written);
        }
        let long = vec!["0"; 2049].join(",");
        for wrong in
            ["", ",", "1,", "a", "1-", "-1", "7-4", "8192", "0-8192", "1 ", "+1", "1--2", "0x1", &long]
        {
            assert!(wrong.parse::<CpuList>().is_err(), "{wrong}");
        }
        assert_eq!(CpuList::of_kernel("0-1\n").unwrap().to_string(), "0-1");
        assert_eq!(CpuList::of_kernel("\n"), None, "a node without CPUs");
    }

    #[test]
    fn lists_are_compared_by_their_numbers() {
        let list = |text: &str| text.parse::<CpuList>().unwrap();
        assert_eq!(list("0-3,8").without(&list("1-2,8-9")), Some(list("0,3")));
        assert_eq!(list("0-3").without(&list("0-7")), None);
        assert_eq!(list("0-1").union(&list("2,9")), list("0-2,9"));
        assert!(list("4-7").contains(7) && !list("4-7").contains(8));
    }
}
