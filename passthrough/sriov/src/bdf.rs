// SPDX-License-Identifier: Apache-2.0

//! The address of a PCI function.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The address of a PCI function: domain, bus, device and function, written `0000:01:10.0`.
///
/// It cannot be invalid: the device is at most 31 and the function at most 7. That makes it safe as a component of a
/// path in sysfs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Bdf {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

/// A text that is no PCI address.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "\"{0}\" is not a PCI address: write domain:bus:device.function in hexadecimal with all zeros, like \
     0000:01:10.0"
)]
pub struct InvalidBdf(String);

impl Bdf {
    /// The address with these parts; `None` for a device above 31 or a function above 7.
    pub const fn new(domain: u32, bus: u8, device: u8, function: u8) -> Option<Self> {
        if device < 32 && function < 8 { Some(Self { domain, bus, device, function }) } else { None }
    }

    /// The PCI domain (segment): 16 bits on real hardware, larger for domains that software made up (VMD).
    pub const fn domain(self) -> u32 {
        self.domain
    }

    /// The bus, 0 to 255.
    pub const fn bus(self) -> u8 {
        self.bus
    }

    /// The device, 0 to 31.
    pub const fn device(self) -> u8 {
        self.device
    }

    /// The function, 0 to 7.
    pub const fn function(self) -> u8 {
        self.function
    }
}

/// A hexadecimal number of exactly `digits` digits: `from_str_radix` alone would take a sign.
fn hex(text: &str, digits: usize) -> Option<u8> {
    (text.len() == digits && text.bytes().all(|b| b.is_ascii_hexdigit()))
        .then(|| u8::from_str_radix(text, 16).ok())
        .flatten()
}

/// The domain: four digits, or up to eight without leading zeros, as the kernel prints it.
fn domain(text: &str) -> Option<u32> {
    let canonical = text.len() == 4 || ((5..=8).contains(&text.len()) && !text.starts_with('0'));
    (canonical && text.bytes().all(|b| b.is_ascii_hexdigit()))
        .then(|| u32::from_str_radix(text, 16).ok())
        .flatten()
}

impl FromStr for Bdf {
    type Err = InvalidBdf;

    fn from_str(text: &str) -> Result<Self, InvalidBdf> {
        let parse = || {
            let mut parts = text.split(':');
            let (first, bus, rest) = (parts.next()?, parts.next()?, parts.next()?);
            let (device, function) = rest.split_once('.')?;
            if parts.next().is_some() {
                return None;
            }
            Self::new(domain(first)?, hex(bus, 2)?, hex(device, 2)?, hex(function, 1)?)
        };
        // The text may come from an API client: bound its copy in the error.
        parse().ok_or_else(|| InvalidBdf(text.chars().take(40).collect()))
    }
}

impl TryFrom<String> for Bdf {
    type Error = InvalidBdf;

    fn try_from(text: String) -> Result<Self, InvalidBdf> {
        text.parse()
    }
}

impl From<Bdf> for String {
    fn from(bdf: Bdf) -> Self {
        bdf.to_string()
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

impl fmt::Debug for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn texts() {
        let check = |text: &str, expect: Option<&str>| {
            assert_eq!(text.parse::<Bdf>().ok().map(|b| b.to_string()).as_deref(), expect, "{text}");
        };
        check("0000:01:10.0", Some("0000:01:10.0"));
        check("FFFF:AB:1F.7", Some("ffff:ab:1f.7"));
        check("10000:e1:00.0", Some("10000:e1:00.0"));
        for wrong in [
            "",
            "01:10.0",
            "0000:01:10",
            "0000:01:20.0",
            "0000:01:10.8",
            "0000:01:10.00",
            "000:01:10.0",
            "00000:01:10.0",
            "0000:01:10.0:1",
            "0000:+1:10.0",
            "0000:1:10.0",
            " 0000:01:10.0",
            "0000:01:10.0\n",
            "../../0000:01:10.0",
        ] {
            check(wrong, None);
        }
    }

    proptest! {
        #[test]
        fn text_and_back(domain: u32, bus: u8, device in 0..32u8, function in 0..8u8) {
            let bdf = Bdf::new(domain, bus, device, function).unwrap();
            prop_assert_eq!(bdf.to_string().parse::<Bdf>(), Ok(bdf));
        }

        #[test]
        fn what_parses_is_a_file_name(text in ".{0,20}") {
            if let Ok(bdf) = text.parse::<Bdf>() {
                prop_assert!(!bdf.to_string().contains('/'));
            }
        }
    }
}
