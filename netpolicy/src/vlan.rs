// SPDX-License-Identifier: Apache-2.0

//! VLAN numbers and sets of them (IEEE 802.1Q).

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, de};
use thiserror::Error;

use crate::clipped;

/// A VLAN: 1 to 4094. 0 means "priority tag only" on the wire, 4095 is reserved: neither is a VLAN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "i64", into = "u16")]
pub struct VlanId(u16);

/// Errors of VLANs, priorities and sets of VLANs.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum VlanError {
    /// Outside of 1 to 4094.
    #[error("VLAN {0} does not exist: use 1 to 4094")]
    Id(i64),
    /// Outside of 0 to 7.
    #[error("VLAN priority {0} does not exist: use 0 to 7")]
    Qos(i64),
    /// Neither a number nor two numbers with a dash.
    #[error("{0:?} is not a range of VLANs: write a number or a range like 100-200")]
    Syntax(String),
    /// A range that ends before it starts.
    #[error("VLAN range {0}-{1} ends before it starts: swap its ends")]
    Reversed(u16, u16),
    /// A set without a VLAN.
    #[error("A trunk needs at least one VLAN: list some, or use none")]
    Empty,
    /// More separate ranges than a set stores.
    #[error("{0} separate ranges of VLANs are too many: at most {max}", max = VlanSet::MAX_RANGES)]
    TooManyRanges(usize),
}

impl VlanId {
    /// The lowest VLAN.
    pub const MIN: Self = Self(1);
    /// The highest VLAN.
    pub const MAX: Self = Self(4094);

    /// Makes a VLAN of its number.
    ///
    /// # Errors
    /// [`VlanError::Id`] outside of 1 to 4094.
    pub const fn new(id: u16) -> Result<Self, VlanError> {
        if id >= Self::MIN.0 && id <= Self::MAX.0 { Ok(Self(id)) } else { Err(VlanError::Id(id as i64)) }
    }

    /// The number, 1 to 4094.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0
    }
}

impl TryFrom<i64> for VlanId {
    type Error = VlanError;

    fn try_from(id: i64) -> Result<Self, VlanError> {
        u16::try_from(id).map_or(Err(VlanError::Id(id)), Self::new)
    }
}

impl From<VlanId> for u16 {
    fn from(vlan: VlanId) -> Self {
        vlan.0
    }
}

impl fmt::Display for VlanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// The priority code point of a VLAN tag: 0 to 7, 0 by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "i64", into = "u8")]
pub struct Qos(u8);

impl Qos {
    /// Makes a priority of its number.
    ///
    /// # Errors
    /// [`VlanError::Qos`] above 7.
    pub const fn new(priority: u8) -> Result<Self, VlanError> {
        if priority <= 7 { Ok(Self(priority)) } else { Err(VlanError::Qos(priority as i64)) }
    }

    /// The number, 0 to 7.
    #[must_use]
    pub const fn get(self) -> u8 {
        self.0
    }

    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl TryFrom<i64> for Qos {
    type Error = VlanError;

    fn try_from(priority: i64) -> Result<Self, VlanError> {
        u8::try_from(priority).map_or(Err(VlanError::Qos(priority)), Self::new)
    }
}

impl From<Qos> for u8 {
    fn from(qos: Qos) -> Self {
        qos.0
    }
}

/// The tag that the adapter adds and strips for an access port (IFLA_VF_VLAN).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccessVlan {
    /// The VLAN.
    pub id: VlanId,
    /// The priority in the tag.
    #[serde(default, skip_serializing_if = "Qos::is_default")]
    pub qos: Qos,
}

impl fmt::Display for AccessVlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.id)?;
        if self.qos.is_default() { Ok(()) } else { write!(f, " (priority {})", self.qos.get()) }
    }
}

/// A set of at least one VLAN, kept as sorted, separate ranges. In JSON a list of numbers and ranges: `[7, "100-200"]`.
#[derive(Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(into = "Vec<RangeText>")]
pub struct VlanSet {
    // Sorted, neither overlapping nor adjacent, not empty.
    ranges: Vec<(VlanId, VlanId)>,
}

impl VlanSet {
    /// The most separate ranges of a set.
    pub const MAX_RANGES: usize = 128;

    /// Makes the union of inclusive ranges.
    ///
    /// # Errors
    /// A range ends before it starts, there is no range, or there are more than [`MAX_RANGES`](Self::MAX_RANGES).
    pub fn new(ranges: impl IntoIterator<Item = (VlanId, VlanId)>) -> Result<Self, VlanError> {
        let mut sorted: Vec<_> = ranges.into_iter().collect();
        sorted.sort_unstable();
        let mut merged: Vec<(VlanId, VlanId)> = Vec::new();
        for (first, last) in sorted {
            if first > last {
                return Err(VlanError::Reversed(first.0, last.0));
            }
            match merged.last_mut() {
                Some((_, end)) if first.0 <= end.0 + 1 => *end = last.max(*end),
                _ => merged.push((first, last)),
            }
        }
        match merged.len() {
            0 => Err(VlanError::Empty),
            n if n > Self::MAX_RANGES => Err(VlanError::TooManyRanges(n)),
            _ => Ok(Self { ranges: merged }),
        }
    }

    /// Every VLAN.
    #[must_use]
    pub fn all() -> Self {
        Self { ranges: vec![(VlanId::MIN, VlanId::MAX)] }
    }

    /// Whether `vlan` is in the set.
    #[must_use]
    pub fn contains(&self, vlan: VlanId) -> bool {
        let after = self.ranges.partition_point(|(first, _)| *first <= vlan);
        after.checked_sub(1).and_then(|i| self.ranges.get(i)).is_some_and(|(_, last)| vlan <= *last)
    }

    /// The ranges, inclusive, sorted, separate.
    #[must_use]
    pub fn ranges(&self) -> &[(VlanId, VlanId)] {
        &self.ranges
    }
}

impl fmt::Display for VlanSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (first, last)) in self.ranges.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            if first == last { write!(f, "{comma}{first}")? } else { write!(f, "{comma}{first}-{last}")? }
        }
        Ok(())
    }
}

impl fmt::Debug for VlanSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for VlanSet {
    type Err = VlanError;

    /// Parses numbers and ranges, separated by commas: `7,100-200`.
    fn from_str(text: &str) -> Result<Self, VlanError> {
        Self::new(text.split(',').map(parse_range).collect::<Result<Vec<_>, _>>()?)
    }
}

fn parse_range(text: &str) -> Result<(VlanId, VlanId), VlanError> {
    let text = text.trim();
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let id = |part: &str| {
        let number = part.trim().parse().map_err(|_| VlanError::Syntax(clipped(text, 40)));
        VlanId::new(number?)
    };
    Ok((id(first)?, id(last)?))
}

// One member of the list in JSON: a number, or a range as text (a number as text is accepted, too).
#[derive(Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a VLAN number or a range like \"100-200\"")]
enum RangeText {
    Number(i64),
    Text(String),
}

impl From<VlanSet> for Vec<RangeText> {
    fn from(set: VlanSet) -> Self {
        let item = |(first, last): &(VlanId, VlanId)| {
            if first == last {
                RangeText::Number(first.0.into())
            } else {
                RangeText::Text(format!("{first}-{last}"))
            }
        };
        set.ranges.iter().map(item).collect()
    }
}

impl<'de> Deserialize<'de> for VlanSet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let items = Vec::<RangeText>::deserialize(deserializer)?;
        let ranges = items.iter().map(|item| match item {
            RangeText::Number(id) => VlanId::try_from(*id).map(|id| (id, id)),
            RangeText::Text(text) => parse_range(text),
        });
        let ranges = ranges.collect::<Result<Vec<_>, _>>().map_err(de::Error::custom)?;
        Self::new(ranges).map_err(de::Error::custom)
    }
}
