// SPDX-License-Identifier: Apache-2.0

//! Flow control of an interface, by ethtool's family of generic netlink (Linux 5.7). Reading needs no privilege.

use std::io;

use netlink_packet_core::NlasIterator;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_GENERIC};

/// Whether an interface obeys and sends PAUSE frames (IEEE 802.3, annex 31B), as far as its driver is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowControl {
    /// A PAUSE frame that arrives stops the port's transmitter.
    pub receive: bool,
    /// The port sends PAUSE frames when its buffers are full.
    pub send: bool,
}

const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_HEADER: usize = 16;
const GENL_HEADER: usize = 4;
const NLA_F_NESTED: u16 = 1 << 15;
/// Longer than both answers.
const LONGEST_ANSWER: usize = 16 * 1024;

// linux/genetlink.h
const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

// linux/ethtool_netlink.h
const ETHTOOL_MSG_PAUSE_GET: u8 = 21;
const ETHTOOL_A_HEADER_DEV_NAME: u16 = 2;
const ETHTOOL_A_PAUSE_HEADER: u16 = 1;
const ETHTOOL_A_PAUSE_RX: u16 = 3;
const ETHTOOL_A_PAUSE_TX: u16 = 4;

/// Reads the flow control of an interface of this network namespace. None if its driver has none to set.
///
/// # Errors
/// No such interface, or a kernel without this request.
pub fn flow_control(interface: &str) -> io::Result<Option<FlowControl>> {
    let mut socket = Socket::new(NETLINK_GENERIC)?;
    socket.bind_auto()?;
    // Receive from the kernel only.
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.set_non_blocking(true)?;
    let name = attribute(CTRL_ATTR_FAMILY_NAME, b"ethtool\0");
    let answer = exchange(&socket, GENL_ID_CTRL, CTRL_CMD_GETFAMILY, &name)?;
    let family = find(&answer, CTRL_ATTR_FAMILY_ID)
        .and_then(|value| Some(u16::from_ne_bytes(value.try_into().ok()?)))
        .ok_or_else(nonsense)?;
    let name = attribute(ETHTOOL_A_HEADER_DEV_NAME, &[interface.as_bytes(), b"\0"].concat());
    let header = attribute(ETHTOOL_A_PAUSE_HEADER | NLA_F_NESTED, &name);
    match exchange(&socket, family, ETHTOOL_MSG_PAUSE_GET, &header) {
        Ok(answer) => {
            let is_on = |kind| find(&answer, kind).map(|value| value.first() != Some(&0));
            Ok(is_on(ETHTOOL_A_PAUSE_RX)
                .zip(is_on(ETHTOOL_A_PAUSE_TX))
                .map(|(receive, send)| FlowControl { receive, send }))
        }
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(None),
        Err(error) => Err(error),
    }
}

fn nonsense() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer makes no sense")
}

/// An attribute with its padding.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len().saturating_add(4)).unwrap_or(u16::MAX);
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// The value of an attribute.
fn find(attributes: &[u8], kind: u16) -> Option<Vec<u8>> {
    let known = NlasIterator::new(attributes).map_while(Result::ok);
    known.into_iter().find(|attribute| attribute.kind() == kind).map(|attribute| attribute.value().to_vec())
}

/// Sends a request and returns the attributes of its answer. The kernel answers within `send`.
fn exchange(socket: &Socket, family: u16, command: u8, attributes: &[u8]) -> io::Result<Vec<u8>> {
    let length = NLMSG_HEADER + GENL_HEADER + attributes.len();
    let mut request = u32::try_from(length).map_err(|_| nonsense())?.to_ne_bytes().to_vec();
    request.extend([family.to_ne_bytes(), NLM_F_REQUEST.to_ne_bytes()].concat());
    // The only request on this socket before its answer: no sequence number, no port.
    request.extend([0; 8]);
    request.extend([command, 1, 0, 0]);
    request.extend_from_slice(attributes);
    socket.send(&request, 0)?;
    let mut answer = Vec::with_capacity(LONGEST_ANSWER);
    socket.recv(&mut answer, 0)?;
    attributes_of(&answer)
}

/// The attributes of an answer.
fn attributes_of(answer: &[u8]) -> io::Result<Vec<u8>> {
    let number = |at: usize| Some(u32::from_ne_bytes(answer.get(at..at + 4)?.try_into().ok()?));
    let kind = answer.get(4..6).and_then(|kind| Some(u16::from_ne_bytes(kind.try_into().ok()?)));
    if kind == Some(NLMSG_ERROR) {
        let errno = number(NLMSG_HEADER).ok_or_else(nonsense)?;
        return Err(io::Error::from_raw_os_error(errno.cast_signed().saturating_neg()));
    }
    let length = number(0).and_then(|length| usize::try_from(length).ok()).ok_or_else(nonsense)?;
    answer.get(NLMSG_HEADER + GENL_HEADER..length).map(<[u8]>::to_vec).ok_or_else(nonsense)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The loopback interface exists everywhere, and has no flow control.
    #[test]
    fn the_kernel_answers() {
        assert_eq!(flow_control("lo").unwrap(), None);
        let error = flow_control("no-such-if").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV), "{error}");
    }

    #[test]
    fn an_answer_is_read_and_nonsense_is_not() {
        let answer = |kind: u16, rest: &[u8]| {
            let mut bytes = (NLMSG_HEADER + GENL_HEADER + rest.len()).to_ne_bytes()[..4].to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.resize(NLMSG_HEADER + GENL_HEADER, 0);
            bytes.extend_from_slice(rest);
            bytes
        };
        let pause = [attribute(ETHTOOL_A_PAUSE_RX, &[1]), attribute(ETHTOOL_A_PAUSE_TX, &[0])].concat();
        let attributes = attributes_of(&answer(20, &pause)).unwrap();
        assert_eq!(find(&attributes, ETHTOOL_A_PAUSE_RX), Some(vec![1]));
        assert_eq!(find(&attributes, ETHTOOL_A_PAUSE_TX), Some(vec![0]));
        assert_eq!(find(&attributes, 2), None);
        for length in 0..NLMSG_HEADER + GENL_HEADER + pause.len() {
            let error = attributes_of(&answer(20, &pause)[..length]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{length}");
        }
        let mut refused = answer(NLMSG_ERROR, &[]);
        refused[NLMSG_HEADER..].copy_from_slice(&(-libc::ENODEV).to_ne_bytes());
        assert_eq!(attributes_of(&refused).unwrap_err().raw_os_error(), Some(libc::ENODEV));
    }
}
