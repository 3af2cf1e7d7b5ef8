// SPDX-License-Identifier: Apache-2.0

//! Interfaces of VMs on bridges of the host.
//!
//! The bridge checks the senders, because a vmm may be taken over: the port is *locked*, so that the
//! bridge drops frames from other addresses than those of its forwarding table for this port
//! (`IFLA_BRPORT_LOCKED`, Linux 5.16). The port learns no address, and has one that is static. A
//! bridge with spanning tree shuts the port at its first spanning tree message.

use std::{io, time::Duration};

use failpoints::{Point, reach};
use netpolicy::MacAddress;

use super::{
    message::{add_forwarding, get_link, lock_port, set_up, to_bridge},
    socket::{Connection, Failure},
};

/// The time that an answer may take once the kernel has handled the request.
const PATIENCE: Duration = Duration::from_secs(2);

/// Errors of a port of a bridge.
#[derive(Debug, thiserror::Error)]
pub enum BridgePortError {
    /// The agent lacks CAP_NET_ADMIN.
    #[error("the agent needs CAP_NET_ADMIN")]
    NotPermitted,
    /// The kernel refused a step.
    #[error("the kernel refuses to {step}{}", .text.as_ref().map(|text| format!(" ({text})")).unwrap_or_default())]
    Refused {
        /// The step.
        step: &'static str,
        /// The kernel's message.
        text: Option<String>,
        /// The kernel's error.
        source: io::Error,
    },
    /// The port is not locked, although the kernel said so: it does not know locked ports.
    #[error("the kernel cannot lock ports of bridges: it must be Linux 5.16 or newer")]
    NotLocked,
    /// The kernel's answer is missing or makes no sense.
    #[error("rtnetlink does not answer to {step} ({what})")]
    NoAnswer {
        /// The step.
        step: &'static str,
        /// What came.
        what: String,
    },
}

fn failed(step: &'static str) -> impl Fn(Failure) -> BridgePortError {
    move |failure| match failure {
        Failure::Refused { errno: libc::EPERM | libc::EACCES, .. } => BridgePortError::NotPermitted,
        Failure::Refused { errno, text } => {
            BridgePortError::Refused { step, text, source: io::Error::from_raw_os_error(errno) }
        }
        Failure::Timeout => BridgePortError::NoAnswer { step, what: "no answer".to_owned() },
        Failure::Protocol(what) => BridgePortError::NoAnswer { step, what },
        Failure::Io(source) => BridgePortError::Refused { step, text: None, source },
    }
}

/// The first byte of the interface's own address: a bridge takes the lowest address of its ports, and
/// this one is higher than those of adapters. The address is local and of no group.
const HIGH: u8 = 0xfe;

/// Puts an interface that is down on a bridge and sets it up: frames from `mac` pass, others do not.
/// `bridge` and `interface` are indices of interfaces; `mtu` is the bridge's.
///
/// # Errors
/// See [`BridgePortError`]. The interface may be on the bridge then, and is down.
pub fn join_bridge(bridge: u32, interface: u32, mac: MacAddress, mtu: u32) -> Result<(), BridgePortError> {
    let open = "open a netlink socket";
    let mut connection = Connection::open(PATIENCE).map_err(|source| failed(open)(source.into()))?;
    let mut order = |step, request: &dyn Fn(u32) -> Vec<u8>| connection.order(request).map_err(failed(step));
    let [_, rest @ ..] = mac.bytes();
    let [a, b, c, d, e] = rest;
    let own = MacAddress::new([HIGH, a, b, c, d, e]);
    order("put it on the bridge", &|sequence| to_bridge(bridge, interface, own, mtu, sequence))?;
    reach(Point::NicBridged);
    order("lock the port", &|sequence| lock_port(interface, sequence))?;
    reach(Point::NicPortLocked);
    order("add the address to the bridge", &|sequence| add_forwarding(interface, mac, sequence))?;
    reach(Point::NicAddressed);
    // An older kernel skips attributes that it does not know.
    let look = "read the port";
    let link = connection.ask(|sequence| get_link(interface, sequence)).map_err(failed(look))?;
    if link.locked != Some(true) {
        return Err(BridgePortError::NotLocked);
    }
    connection.order(|sequence| set_up(interface, sequence)).map_err(failed("set it up"))?;
    reach(Point::NicUp);
    Ok(())
}
