// SPDX-License-Identifier: Apache-2.0

//! `--sim-pf NAME=COUNT[,tap=IFNAME]`.

use std::str::FromStr;

use sriov::Bdf;

use crate::MAX_VFS;

/// Longest name in bytes: that of an interface.
const NAME: usize = 15;

/// A simulated PF as the command line specifies it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SimPfOption {
    /// Its name, in place of the interface's name of a real PF.
    pub name: String,
    /// Its number of VFs.
    pub vfs: u16,
    /// The tap device that is its uplink.
    pub tap: Option<String>,
}

/// Why an option is not valid.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidOption {
    /// The form is wrong.
    #[error("write NAME=COUNT or NAME=COUNT,tap=IFNAME, like sim0=8")]
    Form,
    /// The name of the PF or of the tap is not allowed.
    #[error("{0:?} is not a name: use 1 to {NAME} letters, digits, `_`, `-` and `.`, and no PCI address")]
    Name(String),
    /// The number of VFs is out of range.
    #[error("{0:?} is not a number of VFs: a simulated PF has 1 to {MAX_VFS}")]
    Count(String),
}

fn name(text: &str) -> Result<String, InvalidOption> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    let right = (1..=NAME).contains(&text.len())
        && text.bytes().all(allowed)
        // A leading dot would be special in a path, and a leading dash would be an option to
        // programs.
        && !text.starts_with(['.', '-'])
        && text.parse::<Bdf>().is_err();
    if right { Ok(text.to_owned()) } else { Err(InvalidOption::Name(text.chars().take(40).collect())) }
}

impl FromStr for SimPfOption {
    type Err = InvalidOption;

    fn from_str(text: &str) -> Result<Self, InvalidOption> {
        let (pf, rest) = text.split_once('=').ok_or(InvalidOption::Form)?;
        let (count, tap) = match rest.split_once(',') {
            Some((count, tap)) => (count, Some(tap.strip_prefix("tap=").ok_or(InvalidOption::Form)?)),
            None => (rest, None),
        };
        let vfs = count.parse().ok().filter(|vfs| (1..=MAX_VFS).contains(vfs));
        Ok(Self {
            name: name(pf)?,
            vfs: vfs.ok_or_else(|| InvalidOption::Count(count.chars().take(40).collect()))?,
            tap: tap.map(name).transpose()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts() {
        let check = |text: &str, expect: Option<(&str, u16, Option<&str>)>| {
            let option = text.parse::<SimPfOption>().ok();
            let found = option.as_ref().map(|o| (o.name.as_str(), o.vfs, o.tap.as_deref()));
            assert_eq!(found, expect, "{text}");
        };
        check("sim0=8", Some(("sim0", 8, None)));
        check("a.b-c_d=64,tap=tap0", Some(("a.b-c_d", 64, Some("tap0"))));
        for wrong in [
            "",
            "sim0",
            "sim0=",
            "sim0=0",
            "sim0=65",
            "sim0=-1",
            "=2",
            "a/b=2",
            "..=2",
            "-x=2",
            "sim0=2,",
            "sim0=2,tap=",
            "sim0=2,tap=a/b",
            "sim0=2,up=x",
            "0123456789abcdef=2",
            "0000:01:00.0=2",
            "a b=2",
            "é=2",
        ] {
            check(wrong, None);
        }
    }
}
