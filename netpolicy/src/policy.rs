// SPDX-License-Identifier: Apache-2.0

//! The settings of a port and their sources.
//!
//! Each level (switch, port group, port) decides a part of them ([`Settings`]). An [`EffectivePolicy`] has the
//! resulting settings of a port, each with the level that decided it.

use std::{fmt, num::NonZeroU32};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{self, EnumAccess, Visitor, value::EnumAccessDeserializer},
};
use thiserror::Error;

use crate::{
    mac::{MacAddress, MacPattern},
    request::PromiscuousMode,
    vlan::{AccessVlan, Qos, VlanId, VlanSet},
};

/// A number outside of a setting's range.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{value} is out of range: use {min} to {max}")]
pub struct RangeError {
    value: i64,
    min: i64,
    max: i64,
}

/// A limit on a VF's number of things, from 0 to `MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "i64", into = "u16")]
pub struct Limit<const MAX: u16>(u16);

impl<const MAX: u16> Limit<MAX> {
    /// The highest limit.
    pub const MAX: Self = Self(MAX);

    /// Makes a limit of a number.
    ///
    /// # Errors
    /// [`RangeError`] above `MAX`.
    pub const fn new(value: u16) -> Result<Self, RangeError> {
        if value <= MAX { Ok(Self(value)) } else { Err(Self::outside(value as i64)) }
    }

    const fn outside(value: i64) -> RangeError {
        RangeError { value, min: 0, max: MAX as i64 }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0
    }

    pub(crate) fn allows(self, count: usize) -> bool {
        count <= usize::from(self.0)
    }
}

impl<const MAX: u16> TryFrom<i64> for Limit<MAX> {
    type Error = RangeError;

    fn try_from(value: i64) -> Result<Self, RangeError> {
        u16::try_from(value).map_or(Err(Self::outside(value)), Self::new)
    }
}

impl<const MAX: u16> From<Limit<MAX>> for u16 {
    fn from(limit: Limit<MAX>) -> Self {
        limit.0
    }
}

/// Multicast hashes of a VF. The mailbox carries 30; above that igb turns all-multicast on.
pub type MulticastLimit = Limit<30>;
/// Unicast addresses of a VF besides its own. igbvf requests at most three, and all VFs share the adapter's 24
/// (82576).
pub type UnicastLimit = Limit<3>;
/// VLANs of a trunk port. All VFs of an 82576 share 32 entries.
pub type VlanLimit = Limit<32>;

/// A maximum transmission unit in bytes, 68 (RFC 791) to 9216 (igb's largest).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "i64", into = "u16")]
pub struct Mtu(u16);

impl Mtu {
    /// The smallest MTU.
    pub const MIN: Self = Self(68);
    /// Ethernet's usual MTU.
    pub const STANDARD: Self = Self(1500);
    /// The largest MTU.
    pub const MAX: Self = Self(9216);
    /// The bytes of a frame around its payload: header 14, two VLAN tags 8, checksum 4.
    ///
    /// Drivers add their own count of these to the MTU when they request a frame length: igbvf one tag, DPDK's
    /// `net_e1000_igb_vf` two. A driver that counts fewer can receive a few bytes more than its MTU, which is
    /// harmless.
    pub const OVERHEAD: u16 = 26;

    /// Makes an MTU of bytes.
    ///
    /// # Errors
    /// [`RangeError`] outside of 68 to 9216.
    pub const fn new(bytes: u16) -> Result<Self, RangeError> {
        if bytes >= Self::MIN.0 && bytes <= Self::MAX.0 {
            Ok(Self(bytes))
        } else {
            Err(Self::outside(bytes as i64))
        }
    }

    const fn outside(value: i64) -> RangeError {
        RangeError { value, min: Self::MIN.0 as i64, max: Self::MAX.0 as i64 }
    }

    /// The MTU in bytes.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0
    }

    /// The longest frame of this MTU in bytes, with header, two VLAN tags and checksum.
    #[must_use]
    pub const fn max_frame(self) -> u16 {
        self.0 + Self::OVERHEAD
    }
}

impl TryFrom<i64> for Mtu {
    type Error = RangeError;

    fn try_from(bytes: i64) -> Result<Self, RangeError> {
        u16::try_from(bytes).map_or(Err(Self::outside(bytes)), Self::new)
    }
}

impl From<Mtu> for u16 {
    fn from(mtu: Mtu) -> Self {
        mtu.0
    }
}

/// Whether the guest may change its effective address, and request further unicast addresses. Its initial address is
/// always allowed. In JSON `"reject"`, `"accept"` or `{"list": ["02:00:00:00:00:01", …]}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", expecting = r#""reject", "accept" or {"list": ["02:00:00:00:00:01"]}"#)]
pub enum MacChanges {
    /// No other address than the initial one.
    #[default]
    Reject,
    /// Any address.
    Accept,
    /// The addresses of these patterns.
    List(MacPatterns),
}

impl MacChanges {
    /// Whether an address other than the initial one is allowed.
    #[must_use]
    pub fn allows(&self, mac: MacAddress) -> bool {
        match self {
            Self::Reject => false,
            Self::Accept => true,
            Self::List(patterns) => patterns.0.iter().any(|pattern| pattern.matches(mac)),
        }
    }
}

/// At most 64 patterns of addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<MacPattern>", into = "Vec<MacPattern>")]
pub struct MacPatterns(Vec<MacPattern>);

impl MacPatterns {
    /// The most patterns of a list.
    pub const MAX_LEN: usize = 64;

    /// The patterns.
    #[must_use]
    pub fn as_slice(&self) -> &[MacPattern] {
        &self.0
    }
}

impl TryFrom<Vec<MacPattern>> for MacPatterns {
    type Error = RangeError;

    fn try_from(patterns: Vec<MacPattern>) -> Result<Self, RangeError> {
        if patterns.len() <= Self::MAX_LEN {
            Ok(Self(patterns))
        } else {
            let number = |count| i64::try_from(count).unwrap_or(i64::MAX);
            Err(RangeError { value: number(patterns.len()), min: 0, max: number(Self::MAX_LEN) })
        }
    }
}

impl From<MacPatterns> for Vec<MacPattern> {
    fn from(patterns: MacPatterns) -> Self {
        patterns.0
    }
}

/// Whether a port may have an address that another port has. In JSON `"reject"` or `"same_vm"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MacSharing {
    /// An address belongs to one port of the switch at a time.
    #[default]
    Reject,
    /// Ports of one VM may have the same address, if their VFs are of different PFs. Each may have the initial addresses of the
    /// others without a word of `mac_changes`: they are the VM's own.
    SameVm,
}

/// Whether the guest may send frames from other addresses than its effective one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ForgedTransmits {
    /// The adapter drops them (spoof check on).
    #[default]
    Reject,
    /// Not filtered (spoof check off).
    Accept,
}

/// Whether the guest may receive frames that are not addressed to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Promiscuous {
    /// Only frames addressed to the adapter.
    #[default]
    Reject,
    /// Those frames and all multicast frames: the most that igb can do.
    Multicast,
    /// All frames that the port's VLAN policy allows.
    Accept,
}

impl Promiscuous {
    /// Whether a VF may be in `mode`.
    #[must_use]
    pub fn allows(self, mode: PromiscuousMode) -> bool {
        match self {
            Self::Reject => mode == PromiscuousMode::OFF,
            Self::Multicast => !mode.unicast,
            Self::Accept => true,
        }
    }
}

/// The port's VLANs, and whether adapter or guest tags. In JSON `"none"`, `{"access": {"id": 10, "qos": 3}}` or
/// `{"trunk": [7, "100-200"]}`. A document may have the number of an access VLAN alone, `10`; it is always written in
/// the long form.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum VlanPolicy {
    /// Untagged; the guest may join no VLAN.
    #[default]
    None,
    /// The adapter tags; the guest may join no VLAN.
    Access(AccessVlan),
    /// The guest tags and may join these VLANs.
    Trunk(VlanSet),
}

impl<'de> Deserialize<'de> for VlanPolicy {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_enum("VlanPolicy", &["none", "access", "trunk"], VlanForms)
    }
}

/// Reads the long forms of a [`VlanPolicy`], and its short one if the reader offers a number to an enum.
struct VlanForms;

impl<'de> Visitor<'de> for VlanForms {
    type Value = VlanPolicy;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(r#""none", 100, {"access": {"id": 100}} or {"trunk": [7, "100-200"]}"#)
    }

    fn visit_enum<A: EnumAccess<'de>>(self, form: A) -> Result<VlanPolicy, A::Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "snake_case")]
        enum Long {
            None,
            Access(AccessVlan),
            Trunk(VlanSet),
        }
        Ok(match Long::deserialize(EnumAccessDeserializer::new(form))? {
            Long::None => VlanPolicy::None,
            Long::Access(vlan) => VlanPolicy::Access(vlan),
            Long::Trunk(vlans) => VlanPolicy::Trunk(vlans),
        })
    }

    fn visit_u64<E: de::Error>(self, id: u64) -> Result<VlanPolicy, E> {
        self.visit_i64(i64::try_from(id).unwrap_or(i64::MAX))
    }

    fn visit_i64<E: de::Error>(self, id: i64) -> Result<VlanPolicy, E> {
        let id = VlanId::try_from(id).map_err(E::custom)?;
        Ok(VlanPolicy::Access(AccessVlan { id, qos: Qos::default() }))
    }
}

impl VlanPolicy {
    /// Whether the guest may join `vlan` by itself.
    #[must_use]
    pub fn allows(&self, vlan: VlanId) -> bool {
        matches!(self, Self::Trunk(set) if set.contains(vlan))
    }

    /// The tag that the PF must set.
    #[must_use]
    pub fn access(&self) -> Option<AccessVlan> {
        if let Self::Access(vlan) = self { Some(*vlan) } else { None }
    }
}

/// The sending rate of the VF. In JSON `"unlimited"` or `{"max_tx_mbit": 100}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", expecting = r#""unlimited" or {"max_tx_mbit": 100}"#)]
pub enum Rate {
    /// As fast as the link is.
    #[default]
    Unlimited,
    /// At most this many Mbit/s.
    MaxTxMbit(NonZeroU32),
}

/// The response to a guest whose request is denied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnDenied {
    /// The guest's driver reports an error.
    #[default]
    Nack,
    /// The guest's driver reports success; guest and device now differ.
    Silent,
}

macro_rules! settings {
    ($($field:ident $variant:ident $type:ty = $default:expr, $doc:literal;)*) => {
        /// The name of a setting.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Setting {
            $(#[doc = $doc] $variant,)*
        }

        impl Setting {
            /// All settings.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// Its name in JSON and messages.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => stringify!($field),)* }
            }
        }

        /// The settings of one level: `None` leaves a setting to the level above.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct Settings {
            $(#[doc = $doc] #[serde(skip_serializing_if = "Option::is_none")] pub $field: Option<$type>,)*
        }

        impl Settings {
            /// The settings that this level decides.
            pub fn present(&self) -> impl Iterator<Item = Setting> {
                [$(self.$field.is_some().then_some(Setting::$variant),)*].into_iter().flatten()
            }

            /// Keeps only the settings for which `keep` is true.
            pub(crate) fn retain(&mut self, keep: impl Fn(Setting) -> bool) {
                $(if !keep(Setting::$variant) { self.$field = None; })*
            }
        }

        /// All settings of a port, each with the level that decided it.
        #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
        pub struct EffectivePolicy {
            $(#[doc = $doc] pub $field: Sourced<$type>,)*
        }

        impl EffectivePolicy {
            /// Combines the levels; a later one overrides an earlier one.
            pub(crate) fn resolve(levels: &[(Source, &Settings)]) -> Self {
                Self { $($field: Sourced::resolve($default, levels.iter().map(|(s, level)| (*s, &level.$field))),)* }
            }

            /// The policy when no level decides anything.
            #[must_use]
            pub fn of_defaults() -> Self {
                Self::resolve(&[])
            }

            /// The level that decided a setting.
            #[must_use]
            pub fn source(&self, setting: Setting) -> Source {
                match setting { $(Setting::$variant => self.$field.source,)* }
            }
        }
    };
}

settings! {
    mac_changes MacChanges MacChanges = MacChanges::Reject, "Changes of the effective address. Rejected by default.";
    mac_sharing MacSharing MacSharing = MacSharing::Reject,
        "Addresses that two ports of one VM have, each on another PF, as a bond's. Rejected by default.";
    forged_transmits ForgedTransmits ForgedTransmits = ForgedTransmits::Reject,
        "Frames from other addresses. Rejected by default.";
    promiscuous Promiscuous Promiscuous = Promiscuous::Reject, "Frames to other addresses. Rejected by default.";
    vlan Vlan VlanPolicy = VlanPolicy::None, "VLANs. None by default.";
    multicast_limit MulticastLimit MulticastLimit = Limit(30), "Multicast hashes, at most 30. 30 by default.";
    unicast_limit UnicastLimit UnicastLimit = Limit(0),
        "Unicast addresses besides the effective one, at most 3; each must also pass `mac_changes`. 0 by default.";
    vlan_limit VlanLimit VlanLimit = Limit(8), "VLANs that the guest of a trunk port may join, at most 32. 8 by default.";
    mtu Mtu Mtu = Mtu::STANDARD, "The largest MTU in bytes. 1500 by default. Frames may have 26 bytes more: header, two VLAN tags, checksum.";
    rate Rate Rate = Rate::Unlimited, "Sending rate. Unlimited by default.";
    on_denied OnDenied OnDenied = OnDenied::Nack, "How the guest is told of a refusal. `nack` by default.";
    blocked Blocked bool = false,
        "Whether the port is cut off and may change nothing. A port may always be blocked by itself. Not by default.";
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The level that decided a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// No level: the default of Portcullis.
    Default,
    /// The switch.
    Switch,
    /// The port group.
    PortGroup,
    /// The port's own override.
    Port,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Default => "default",
            Self::Switch => "switch",
            Self::PortGroup => "port_group",
            Self::Port => "port",
        })
    }
}

/// A value and the level that it comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sourced<T> {
    /// The value.
    pub value: T,
    /// The level.
    pub source: Source,
}

impl<T: Clone> Sourced<T> {
    fn resolve<'a>(default: T, levels: impl DoubleEndedIterator<Item = (Source, &'a Option<T>)>) -> Self
    where
        T: 'a,
    {
        let decided =
            levels.rev().find_map(|(source, value)| value.clone().map(|value| Self { value, source }));
        decided.unwrap_or(Self { value: default, source: Source::Default })
    }
}
