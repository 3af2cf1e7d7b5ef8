// SPDX-License-Identifier: Apache-2.0

//! Ethernet addresses and patterns of them.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::clipped;

/// A 48-bit Ethernet address in transmission order. Written `02:00:00:00:00:11`.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress([u8; 6]);

/// Errors of parsing an Ethernet address or pattern.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MacError {
    /// Not six pairs of hexadecimal digits.
    #[error(
        "{0:?} is not an Ethernet address: write six pairs of hexadecimal digits, like 02:00:00:00:00:11"
    )]
    Syntax(String),
    /// A pattern whose address has bits that its mask ignores.
    #[error("Pattern {0}/{1} has address bits outside of its mask: clear them or widen the mask")]
    OutsideMask(MacAddress, MacAddress),
}

impl MacAddress {
    /// The all-zero address: "none" to PF drivers.
    pub const ZERO: Self = Self([0; 6]);

    /// Makes an address of six bytes in transmission order.
    #[must_use]
    pub const fn new(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }

    /// The six bytes in transmission order.
    #[must_use]
    pub const fn bytes(self) -> [u8; 6] {
        self.0
    }

    /// Whether the group bit (bit 0 of the first byte) is clear. The zero address counts as unicast here.
    #[must_use]
    pub const fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0
    }

    /// Whether all bits are zero.
    #[must_use]
    pub fn is_zero(self) -> bool {
        self == Self::ZERO
    }

    /// Whether an administrator assigned the address, and not a vendor (bit 1 of the first byte).
    #[must_use]
    pub const fn is_locally_administered(self) -> bool {
        self.0[0] & 2 != 0
    }

    /// Whether an adapter can have this address: unicast and not zero.
    #[must_use]
    pub fn is_assignable(self) -> bool {
        self.is_unicast() && !self.is_zero()
    }
}

impl From<[u8; 6]> for MacAddress {
    fn from(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddress {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let error = || MacError::Syntax(clipped(text, 40));
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(error)?;
            // from_str_radix alone would accept a sign.
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(error());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        if parts.next().is_some() { Err(error()) } else { Ok(Self(bytes)) }
    }
}

impl TryFrom<String> for MacAddress {
    type Error = MacError;

    fn try_from(text: String) -> Result<Self, MacError> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

/// A set of addresses: those that equal `address` in the bits of `mask`. Written
/// `00:00:5e:00:01:00/ff:ff:ff:ff:ff:00`, or as an address alone when all bits count.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacPattern {
    address: MacAddress,
    mask: MacAddress,
}

impl MacPattern {
    /// Makes the set of addresses that equal `address` in the bits of `mask`.
    ///
    /// # Errors
    /// [`MacError::OutsideMask`] if `address` has bits that `mask` ignores: most likely a typing error.
    pub fn new(address: MacAddress, mask: MacAddress) -> Result<Self, MacError> {
        let pattern = Self { address, mask };
        if pattern.matches(address) && address.0.iter().zip(mask.0).all(|(a, m)| a & !m == 0) {
            Ok(pattern)
        } else {
            Err(MacError::OutsideMask(address, mask))
        }
    }

    /// Whether `mac` is in the set.
    #[must_use]
    pub fn matches(&self, mac: MacAddress) -> bool {
        let pairs = self.address.0.iter().zip(mac.0).zip(self.mask.0);
        pairs.fold(0, |difference, ((a, b), m)| difference | ((a ^ b) & m)) == 0
    }
}

impl From<MacAddress> for MacPattern {
    fn from(address: MacAddress) -> Self {
        Self { address, mask: MacAddress([0xff; 6]) }
    }
}

impl fmt::Display for MacPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.mask.0 == [0xff; 6] {
            write!(f, "{}", self.address)
        } else {
            write!(f, "{}/{}", self.address, self.mask)
        }
    }
}

impl fmt::Debug for MacPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacPattern {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        match text.split_once('/') {
            Some((address, mask)) => Self::new(address.parse()?, mask.parse()?),
            None => Ok(text.parse::<MacAddress>()?.into()),
        }
    }
}

impl TryFrom<String> for MacPattern {
    type Error = MacError;

    fn try_from(text: String) -> Result<Self, MacError> {
        text.parse()
    }
}

impl From<MacPattern> for String {
    fn from(pattern: MacPattern) -> Self {
        pattern.to_string()
    }
}
