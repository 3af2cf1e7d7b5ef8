// SPDX-License-Identifier: Apache-2.0

//! NICs of virtual machines: virtio network devices on interfaces of the host, or with a port of a port group.

use netpolicy::Mtu;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{AdapterStatus, Name, UnicastMac};
use crate::problem::Problem;

/// The most NICs of a VM.
pub const MAX_NICS: usize = 8;
/// The most pairs of queues of a NIC.
pub const MAX_QUEUES: u8 = 4;
/// The longest name of an interface in bytes (`IFNAMSIZ`, less its end).
const MAX_INTERFACE: usize = 15;
/// The payloads of the shortest and of the longest frame (RFC 791; the maximum of tap interfaces).
const MTUS: std::ops::RangeInclusive<u16> = 68..=65_521;

/// A NIC of a VM: a virtio network device. It has exactly one of `bridge`, `tap`, `macvtap` and `port_group`.
///
/// The first three name an interface that the agent's operator lets VMs use (`serve --interface`). The NIC's frames pass
/// through the host's kernel. A NIC on a bridge sends frames from its own address only.
///
/// A NIC of a port group is a port of the group's switch, as an adapter is: the agent claims a VF of a simulated PF for it. The
/// policy of the group decides about the requests of its driver for addresses, receive modes and VLANs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NicSpec {
    /// Unique among the VM's NICs.
    #[schema(example = "mgmt0")]
    pub id: Name,
    /// A bridge. The agent makes a tap interface on it, which lives as long as the VM's process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "br-mgmt", min_length = 1, max_length = 15)]
    pub bridge: Option<String>,
    /// A tap interface that is there. No other process may have it open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 15)]
    pub tap: Option<String>,
    /// A macvtap interface that is there. The NIC has its address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 15)]
    pub macvtap: Option<String>,
    /// A port group whose switch has a simulated PF as an uplink.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port_group: Option<Name>,
    /// The address; the agent makes a stable locally administered one if there is none. The guest can change it only under a
    /// port group that accepts that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<UnicastMac>,
    /// The MTU that the guest uses: at most that of the interface, which is the default. With `port_group` at most that of
    /// the group, and by default 1500 if the group allows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 68, maximum = 65521, example = 1500)]
    pub mtu: Option<u16>,
    /// Pairs of queues, so that several vCPUs can send and receive at once. 1 with `port_group`.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    #[schema(minimum = 1, maximum = 4, default = 1)]
    pub queues: u8,
}

fn one() -> u8 {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_one(count: &u8) -> bool {
    *count == 1
}

/// The interface of the host that a NIC uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NicInterface<'a> {
    /// A tap interface that the agent makes on this bridge.
    Bridge(&'a str),
    /// This tap interface.
    Tap(&'a str),
    /// This macvtap interface.
    Macvtap(&'a str),
}

impl NicInterface<'_> {
    /// The name of the interface.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Bridge(name) | Self::Tap(name) | Self::Macvtap(name) => name,
        }
    }

    /// The name of the field.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Bridge(_) => "bridge",
            Self::Tap(_) => "tap",
            Self::Macvtap(_) => "macvtap",
        }
    }
}

impl NicSpec {
    fn names_no_interface(&self) -> bool {
        self.bridge.is_none() && self.tap.is_none() && self.macvtap.is_none()
    }

    /// The interface of the host. None for a NIC of a port group. A specification with several of them is invalid, and has
    /// none.
    #[must_use]
    pub fn interface(&self) -> Option<NicInterface<'_>> {
        match (self.bridge.as_deref(), self.tap.as_deref(), self.macvtap.as_deref()) {
            (Some(bridge), None, None) => Some(NicInterface::Bridge(bridge)),
            (None, Some(tap), None) => Some(NicInterface::Tap(tap)),
            (None, None, Some(macvtap)) => Some(NicInterface::Macvtap(macvtap)),
            _ => None,
        }
    }
}

/// The rules for a NIC of a port group. Those for its id and address are those for all ports of a VM.
fn check_of_group(nic: &NicSpec, field: impl Fn(&str) -> String) -> Result<(), Problem> {
    if let Some(mtu) = nic.mtu.filter(|mtu| Mtu::new(*mtu).is_err()) {
        let detail =
            format!("{mtu} is not from {} to {}, as with `port_group`.", Mtu::MIN.get(), Mtu::MAX.get());
        return Err(Problem::invalid(field(".mtu"), detail));
    }
    if nic.queues != 1 {
        return Err(Problem::invalid(field(".queues"), "With `port_group` a NIC has one pair of queues."));
    }
    Ok(())
}

/// The actual state of a NIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NicStatus {
    /// The NIC's id.
    pub id: Name,
    /// Its address: that of the specification, or one that the agent chose. Absent for a macvtap interface of which the
    /// specification has no address: the NIC has the interface's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<UnicastMac>,
    /// The interface of the host that carries its frames, while the VM has a process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "pc1a2b3c4d5en0")]
    pub interface: Option<String>,
    /// The port and its VF, if the NIC has a port group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<AdapterStatus>,
}

/// Whether an interface of Linux can have the name (`dev_valid_name`).
fn is_interface(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':' | b'%');
    !matches!(name, "" | "." | "..") && name.len() <= MAX_INTERFACE && name.bytes().all(allowed)
}

/// The rules that types cannot hold.
///
/// # Errors
/// `invalid_request` with the field of the first rule that is broken.
pub(super) fn check(nics: &[NicSpec]) -> Result<(), Problem> {
    if nics.len() > MAX_NICS {
        return Err(Problem::invalid("nics", format!("A VM has at most {MAX_NICS} NICs.")));
    }
    for (n, nic) in nics.iter().enumerate() {
        let field = |rest: &str| format!("nics[{n}]{rest}");
        let before = nics.iter().take(n);
        if before.clone().any(|other| other.id == nic.id) {
            return Err(Problem::invalid(field(".id"), format!("The id {} is used by two NICs.", nic.id)));
        }
        let same = |other: &NicSpec| nic.mac.is_some() && other.mac == nic.mac;
        if before.clone().any(same) {
            return Err(Problem::invalid(field(".mac"), "The address is used by two NICs."));
        }
        let interface = match (nic.interface(), &nic.port_group) {
            (Some(interface), None) => interface,
            (None, Some(_)) if nic.names_no_interface() => {
                check_of_group(nic, field)?;
                continue;
            }
            _ => {
                let detail = "A NIC has exactly one of bridge, tap, macvtap and port_group.";
                return Err(Problem::invalid(field(""), detail));
            }
        };
        let place = field(&format!(".{}", interface.kind()));
        if !is_interface(interface.name()) {
            let detail = format!(
                "An interface's name has 1 to {MAX_INTERFACE} printable ASCII characters, without blanks, `/`, `:` and `%`."
            );
            return Err(Problem::invalid(place, detail));
        }
        let taken = |other: &NicSpec| other.interface() == Some(interface);
        if !matches!(interface, NicInterface::Bridge(_)) && before.clone().any(taken) {
            let detail = format!("The interface {} is used by two NICs.", interface.name());
            return Err(Problem::invalid(place, detail));
        }
        if let Some(mtu) = nic.mtu.filter(|mtu| !MTUS.contains(mtu)) {
            let detail = format!("{mtu} is not from {} to {}.", MTUS.start(), MTUS.end());
            return Err(Problem::invalid(field(".mtu"), detail));
        }
        if !(1..=MAX_QUEUES).contains(&nic.queues) {
            let detail = format!("{} is not from 1 to {MAX_QUEUES}.", nic.queues);
            return Err(Problem::invalid(field(".queues"), detail));
        }
    }
    Ok(())
}
