// SPDX-License-Identifier: Apache-2.0

//! The messages of rtnetlink that are used here: built with netlink-packet-route, parsed by hand.
//!
//! That crate's parser fails as a whole on any unexpected attribute of a link, and it does not distinguish "off" from
//! "not supported" (all ones) in a VF's switches.

use std::collections::BTreeMap;

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkBuffer, NetlinkMessage, NlasIterator};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    link::{
        InfoBridgePort, InfoPortData, InfoPortKind, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo,
        LinkMessage, LinkVfInfo, VfInfo, VfInfoLinkState, VfInfoMac, VfInfoRate, VfInfoSpoofCheck,
        VfInfoTrust, VfInfoVlan, VfLinkState, VfVlan, VfVlanInfo, VlanProtocol,
    },
    neighbour::{NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
};
use netpolicy::MacAddress;

use crate::control::{PortVlan, TagProtocol, VfChange, VfLink, VfSettings};

const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSGERR_ATTR_MSG: u16 = 1;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_OVERRUN: u16 = 4;
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;

const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_SLAVE_KIND: u16 = 4;
const IFLA_INFO_SLAVE_DATA: u16 = 5;
const IFLA_BRPORT_LOCKED: u16 = 39;
const IFLA_VFINFO_LIST: u16 = 22;
const IFLA_VF_INFO: u16 = 1;
const IFLA_VF_MAC: u16 = 1;
const IFLA_VF_VLAN: u16 = 2;
const IFLA_VF_TX_RATE: u16 = 3;
const IFLA_VF_SPOOFCHK: u16 = 4;
const IFLA_VF_LINK_STATE: u16 = 5;
const IFLA_VF_RATE: u16 = 6;
const IFLA_VF_TRUST: u16 = 9;
const IFLA_VF_VLAN_LIST: u16 = 12;
const IFLA_VF_VLAN_INFO: u16 = 1;
const ETH_P_8021AD: u16 = 0x88a8;
const IFF_UP: u32 = 1;

/// More VFs than any PF has: routing IDs have 16 bits, and real adapters at most 256.
const MOST_VFS: usize = 4096;

/// A message from the kernel.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// The requested acknowledgement: an error number, 0 for success, and the kernel's message.
    Ack { sequence: u32, errno: i32, text: Option<String> },
    /// A link: an answer, or an event (sequence 0).
    Link { sequence: u32, link: Link },
    /// A removed link.
    LinkGone { index: u32 },
    /// The kernel lost messages.
    Overrun,
    /// The end of an answer in several parts.
    Done { sequence: u32 },
    /// Any other message.
    Other,
}

/// The attributes of a link that are read.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Link {
    pub index: u32,
    pub name: Option<String>,
    pub up: bool,
    /// By number; `None` for a message without a list (an event, or an interface that is no PF).
    pub vfs: Option<BTreeMap<u16, VfSettings>>,
    /// Whether the port of a bridge is locked; `None` for an interface that is on no bridge.
    pub locked: Option<bool>,
}

fn request(message: RouteNetlinkMessage, sequence: u32, ack: bool) -> Vec<u8> {
    let mut message = NetlinkMessage::from(message);
    message.header.flags = if ack { NLM_F_REQUEST | NLM_F_ACK } else { NLM_F_REQUEST };
    message.header.sequence_number = sequence;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// RTM_GETLINK for one interface with its VFs. Their counters are left out: they would overflow the list of an adapter
/// with many VFs (an attribute has at most 64 KiB).
pub(super) fn get_link(index: u32, sequence: u32) -> Vec<u8> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::Vf, LinkExtentMask::SkipStats]));
    request(RouteNetlinkMessage::GetLink(link), sequence, false)
}

/// RTM_SETLINK for one change of one VF: the kernel makes several changes in one message one by one and stops at the
/// first error without undoing them.
pub(super) fn set_vf(index: u32, vf: u16, change: VfChange, sequence: u32) -> Vec<u8> {
    let vf = u32::from(vf);
    let info = match change {
        VfChange::Mac(mac) => VfInfo::Mac(VfInfoMac::new(vf, &mac.unwrap_or(MacAddress::ZERO).bytes())),
        VfChange::Vlan(PortVlan { id, qos, protocol: TagProtocol::Dot1Q }) => {
            VfInfo::Vlan(VfInfoVlan::new(vf, id.into(), qos.into()))
        }
        VfChange::Vlan(PortVlan { id, qos, protocol: TagProtocol::Dot1Ad }) => {
            let info = VfVlanInfo::new(vf, id.into(), qos.into(), VlanProtocol::Ieee8021Ad);
            VfInfo::VlanList(vec![VfVlan::Info(info)])
        }
        VfChange::SpoofCheck(on) => VfInfo::SpoofCheck(VfInfoSpoofCheck::new(vf, on)),
        VfChange::Trust(on) => VfInfo::Trust(VfInfoTrust::new(vf, on)),
        VfChange::TxRate { min, max } => VfInfo::Rate(VfInfoRate::new(vf, min, max)),
        VfChange::Link(state) => VfInfo::LinkState(VfInfoLinkState::new(
            vf,
            match state {
                VfLink::Auto => VfLinkState::Auto,
                VfLink::Enable => VfLinkState::Enable,
                VfLink::Disable => VfLinkState::Disable,
            },
        )),
    };
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.attributes.push(LinkAttribute::VfInfoList(vec![LinkVfInfo(vec![info])]));
    request(RouteNetlinkMessage::SetLink(link), sequence, true)
}

/// RTM_SETLINK: an interface goes on a bridge, with an address of its own and an MTU.
pub(super) fn to_bridge(bridge: u32, interface: u32, own: MacAddress, mtu: u32, sequence: u32) -> Vec<u8> {
    let mut link = LinkMessage::default();
    link.header.index = interface;
    // Before it is on the bridge, which takes the smallest MTU and the lowest address of its ports.
    link.attributes.extend([
        LinkAttribute::Address(own.bytes().to_vec()),
        LinkAttribute::Mtu(mtu),
        LinkAttribute::Controller(bridge),
    ]);
    request(RouteNetlinkMessage::SetLink(link), sequence, true)
}

/// RTM_NEWLINK for an interface that exists: a port passes frames from the addresses of its forwarding table only,
/// learns none, and drops spanning tree messages. RTM_SETLINK would skip these attributes.
pub(super) fn lock_port(interface: u32, sequence: u32) -> Vec<u8> {
    let port =
        vec![InfoBridgePort::Guard(true), InfoBridgePort::Learning(false), InfoBridgePort::Locked(true)];
    let mut link = LinkMessage::default();
    link.header.index = interface;
    link.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::PortKind(InfoPortKind::Bridge),
        LinkInfo::PortData(InfoPortData::BridgePort(port)),
    ]));
    request(RouteNetlinkMessage::NewLink(link), sequence, true)
}

/// RTM_NEWNEIGH: a static address of a port in its bridge's forwarding table.
pub(super) fn add_forwarding(interface: u32, mac: MacAddress, sequence: u32) -> Vec<u8> {
    let mut entry = NeighbourMessage::default();
    entry.header.family = AddressFamily::Bridge;
    entry.header.ifindex = interface;
    // `NUD_NOARP`: it does not age. `NTF_MASTER`: the bridge's table, not the interface's.
    entry.header.state = NeighbourState::Noarp;
    entry.header.flags = NeighbourFlags::Controller;
    entry.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.bytes().to_vec()));
    let mut bytes = request(RouteNetlinkMessage::NewNeighbour(entry), sequence, true);
    // `NLM_F_CREATE`, in the header's flags.
    if let Some(flags) = bytes.get_mut(7) {
        *flags |= 4;
    }
    bytes
}

/// RTM_SETLINK: an interface goes up.
pub(super) fn set_up(interface: u32, sequence: u32) -> Vec<u8> {
    let mut link = LinkMessage::default();
    link.header.index = interface;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    request(RouteNetlinkMessage::SetLink(link), sequence, true)
}

/// Splits a datagram into its messages.
pub(super) fn parse(mut datagram: &[u8]) -> Result<Vec<Message>, String> {
    let mut messages = Vec::new();
    while !datagram.is_empty() {
        let buffer = NetlinkBuffer::new_checked(datagram).map_err(|e| e.to_string())?;
        messages.push(message(&buffer)?);
        // `new_checked` has checked that the length is at least the header's and at most the datagram's.
        let length = datagram.len().min((buffer.length() as usize).next_multiple_of(4));
        datagram = datagram.get(length..).unwrap_or_default();
    }
    Ok(messages)
}

fn message(buffer: &NetlinkBuffer<&[u8]>) -> Result<Message, String> {
    let sequence = buffer.sequence_number();
    let payload = buffer.payload();
    Ok(match buffer.message_type() {
        NLMSG_ERROR => {
            let errno = word(payload, 0).ok_or("an error without a number")?.cast_signed().saturating_neg();
            Message::Ack { sequence, errno, text: extended_ack(buffer.flags(), payload) }
        }
        NLMSG_DONE => Message::Done { sequence },
        NLMSG_OVERRUN => Message::Overrun,
        RTM_NEWLINK => Message::Link { sequence, link: link(payload)? },
        RTM_DELLINK => Message::LinkGone { index: word(payload, 1).ok_or("a link without an index")? },
        _ => Message::Other,
    })
}

/// The kernel's message in an error. It is an attribute after the header of the request, or after the whole request if
/// the answer is not capped.
fn extended_ack(flags: u16, payload: &[u8]) -> Option<String> {
    const ERRNO_AND_HEADER: usize = 4 + 16;
    if flags & NLM_F_ACK_TLVS == 0 {
        return None;
    }
    let request = if flags & NLM_F_CAPPED == 0 { (word(payload, 1)? as usize).checked_sub(16)? } else { 0 };
    let attributes = payload.get(ERRNO_AND_HEADER.checked_add(request.checked_next_multiple_of(4)?)?..)?;
    let text = attributes_of(attributes)
        .filter_map(Result::ok)
        .find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG)
        .map(|(_, value)| string(value))?;
    (!text.is_empty()).then_some(text)
}

fn link(payload: &[u8]) -> Result<Link, String> {
    // struct ifinfomsg: family, type, index, flags, change.
    let header = |index| word(payload, index).ok_or("a link without a header");
    let mut link = Link { index: header(1)?, up: header(2)? & IFF_UP != 0, ..Link::default() };
    header(3)?;
    for attribute in attributes_of(payload.get(16..).unwrap_or_default()) {
        match attribute? {
            (IFLA_IFNAME, value) => link.name = Some(string(value)),
            (IFLA_VFINFO_LIST, value) => link.vfs = Some(vfs(value)?),
            (IFLA_LINKINFO, value) => link.locked = locked(value)?,
            _ => {}
        }
    }
    Ok(link)
}

/// Whether the link is a locked port of a bridge.
fn locked(info: &[u8]) -> Result<Option<bool>, String> {
    let (mut is_port, mut locked) = (false, false);
    for attribute in attributes_of(info) {
        match attribute? {
            (IFLA_INFO_SLAVE_KIND, kind) => is_port = string(kind) == "bridge",
            (IFLA_INFO_SLAVE_DATA, data) if is_port => {
                for attribute in attributes_of(data) {
                    if let (IFLA_BRPORT_LOCKED, value) = attribute? {
                        locked = value.first() == Some(&1);
                    }
                }
            }
            _ => {}
        }
    }
    Ok(is_port.then_some(locked))
}

fn vfs(list: &[u8]) -> Result<BTreeMap<u16, VfSettings>, String> {
    let mut vfs = BTreeMap::new();
    for attribute in attributes_of(list).take(MOST_VFS) {
        let (IFLA_VF_INFO, info) = attribute? else { continue };
        let (number, settings) = vf(info)?;
        if vfs.insert(number, settings).is_some() {
            return Err(format!("VF {number} is listed twice"));
        }
    }
    Ok(vfs)
}

fn vf(info: &[u8]) -> Result<(u16, VfSettings), String> {
    let mut number = None;
    let mut settings = VfSettings::default();
    for attribute in attributes_of(info) {
        let (kind, value) = attribute?;
        // All attributes but the nested ones begin with the VF's number.
        let field = |index| word(value, index).ok_or_else(|| format!("VF attribute {kind} is too short"));
        // "Not supported" is all ones.
        let switch = || field(1).map(|word| (word != u32::MAX).then_some(word != 0));
        match kind {
            IFLA_VF_MAC => {
                number = Some(field(0)?);
                let mac = value.get(4..10).and_then(|bytes| <[u8; 6]>::try_from(bytes).ok());
                let mac = MacAddress::new(mac.ok_or("a VF's address is too short")?);
                settings.mac = (!mac.is_zero()).then_some(mac);
            }
            IFLA_VF_VLAN => {
                settings.vlan.id = narrow(field(1)?, "VLAN")?;
                settings.vlan.qos = narrow(field(2)?, "VLAN priority")?;
            }
            IFLA_VF_VLAN_LIST => {
                for attribute in attributes_of(value) {
                    if let (IFLA_VF_VLAN_INFO, vlan) = attribute?
                        && vlan.get(12..14) == Some(&ETH_P_8021AD.to_be_bytes())
                    {
                        settings.vlan.protocol = TagProtocol::Dot1Ad;
                    }
                }
            }
            // Kernels since 3.16 show both rates; the older attribute repeats the higher one.
            IFLA_VF_TX_RATE if settings.max_tx_rate == 0 => settings.max_tx_rate = field(1)?,
            IFLA_VF_RATE => {
                settings.min_tx_rate = field(1)?;
                settings.max_tx_rate = field(2)?;
            }
            IFLA_VF_SPOOFCHK => settings.spoof_check = switch()?,
            IFLA_VF_TRUST => settings.trust = switch()?,
            IFLA_VF_LINK_STATE => {
                settings.link_state = match field(1)? {
                    0 => Some(VfLink::Auto),
                    1 => Some(VfLink::Enable),
                    2 => Some(VfLink::Disable),
                    _ => None,
                };
            }
            _ => {}
        }
    }
    let number = narrow(number.ok_or("a VF without an address")?, "VF number")?;
    Ok((number, settings))
}

fn attributes_of(bytes: &[u8]) -> impl Iterator<Item = Result<(u16, &[u8]), String>> {
    let mut attributes = NlasIterator::new(bytes);
    std::iter::from_fn(move || {
        Some(match attributes.next()? {
            Ok(attribute) => {
                // `value()` would borrow from the iterator's item.
                let value = attribute.into_inner().get(4..usize::from(attribute.length()));
                value.map(|value| (attribute.kind(), value)).ok_or_else(|| "an attribute is cut".to_owned())
            }
            Err(e) => Err(e.to_string()),
        })
    })
}

/// The 32-bit word at `index`, in the host's byte order.
fn word(bytes: &[u8], index: usize) -> Option<u32> {
    let start = index.checked_mul(4)?;
    let bytes = bytes.get(start..start.checked_add(4)?)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

fn narrow<T: TryFrom<u32>>(value: u32, what: &str) -> Result<T, String> {
    T::try_from(value).map_err(|_| format!("the {what} {value} does not exist"))
}

fn string(value: &[u8]) -> String {
    let text = value.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}
