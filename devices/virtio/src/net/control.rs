// SPDX-License-Identifier: Apache-2.0

//! Requests of the control queue (the specification, 5.1.6.5), without their verdict.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MAC,
    VIRTIO_NET_CTRL_MAC_ADDR_SET, VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI,
    VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD, VIRTIO_NET_CTRL_VLAN_DEL,
};
use vm_memory::VolatileSlice;

use crate::queue::{length, part, read_array};

/// A hardware address.
pub type Mac = [u8; 6];

/// The most addresses in a list. A longer list counts as "all addresses", as adapters have it.
pub const MOST_ADDRESSES: usize = 64;

/// Numbers of VLANs.
const VLANS: u16 = 4096;

/// A list of addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Addresses {
    /// These.
    Only(Vec<Mac>),
    /// More than the device can hold.
    All,
}

/// A request of the driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Frames to any unicast address.
    Promiscuous(bool),
    /// Frames to any multicast address.
    AllMulticast(bool),
    /// The lists of further unicast addresses, and of multicast addresses.
    Lists {
        /// Beside the device's own address.
        unicast: Addresses,
        /// Groups.
        multicast: Addresses,
    },
    /// Another address for the device.
    Address(Mac),
    /// Frames of a VLAN, or no longer.
    Vlan {
        /// The VLAN's number: 0 to 4095.
        id: u16,
        /// Whether they are to be received.
        add: bool,
    },
    /// The count of queue pairs that the driver uses.
    Pairs(u16),
    /// The offloads for received frames: bits of the features.
    Offloads(u64),
}

/// The request in `buffers`. None if the device does not know it, or its length is wrong.
#[must_use]
pub fn decode(buffers: &[VolatileSlice<'_>]) -> Option<Request> {
    let [class, command] = read_array(buffers)?;
    let data = part(buffers, 2, u64::MAX);
    let is_switch = || read_array::<1>(&data).map(|[value]| value != 0);
    match (u32::from(class), u32::from(command)) {
        (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC) => is_switch().map(Request::Promiscuous),
        (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI) => is_switch().map(Request::AllMulticast),
        (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET) => {
            let (unicast, end) = list(&data, 0)?;
            let (multicast, _) = list(&data, end)?;
            Some(Request::Lists { unicast, multicast })
        }
        (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET) => read_array(&data).map(Request::Address),
        (VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD | VIRTIO_NET_CTRL_VLAN_DEL) => {
            let id = u16::from_le_bytes(read_array(&data)?);
            let add = u32::from(command) == VIRTIO_NET_CTRL_VLAN_ADD;
            (id < VLANS).then_some(Request::Vlan { id, add })
        }
        (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
            read_array(&data).map(|bytes| Request::Pairs(u16::from_le_bytes(bytes)))
        }
        (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
            read_array(&data).map(|bytes| Request::Offloads(u64::from_le_bytes(bytes)))
        }
        _ => None,
    }
}

/// A list (`struct virtio_net_ctrl_mac`) at `offset`, and the offset behind it.
fn list(data: &[VolatileSlice<'_>], offset: u64) -> Option<(Addresses, u64)> {
    let count = u32::from_le_bytes(read_array(&part(data, offset, 4))?);
    let begin = offset.checked_add(4)?;
    let end = begin.checked_add(u64::from(count).checked_mul(6)?)?;
    if end > length(data) {
        return None;
    }
    if usize::try_from(count).is_ok_and(|count| count > MOST_ADDRESSES) {
        return Some((Addresses::All, end));
    }
    let address = |number: u32| read_array(&part(data, begin + u64::from(number) * 6, 6));
    Some((Addresses::Only((0..count).map(address).collect::<Option<_>>()?), end))
}
