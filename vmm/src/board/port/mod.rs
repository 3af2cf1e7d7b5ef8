// SPDX-License-Identifier: Apache-2.0

//! A NIC under a port group: a virtio network device on a simulated VF.
//!
//! ```text
//!   driver ─▶ control queue ─▶ PortWire::decide ─▶ Driver ─▶ relay ─▶ agent, PF
//!   driver ◀▶ other queues  ◀▶ PortWire ◀▶ FramePort ◀▶ PF
//! ```
//!
//! The wire drives the VF as the driver of a guest would: each request of the control queue becomes messages to the relay,
//! which decides about them as about those of an assigned VF. The PF enforces the result, outside of this process.

use std::{
    collections::BTreeSet,
    io,
    time::{Duration, Instant},
};

use devices::io_thread::{Calls, IoEvent, IoSource};
use netpolicy::{MacAddress, Mtu, PromiscuousMode, Request};
use passthrough::relay::Driver;
use simnic::{Frame, vf::FramePort};
use virtio::net::{
    Abilities, HEADER, Offloads, Policy, PortState, Wire,
    control::{Addresses, Mac, Request as Control},
};
use vm_memory::VolatileSlice;

/// The most time for the messages of one request. The relay takes up to 0.85 s for one of them.
const LIMIT: Duration = Duration::from_millis(1200);
/// The most VLANs that are joined again after a reset of the PF: more than an adapter has filters.
const MOST_VLANS: usize = 64;
/// The most multicast addresses in one message. With more of them, a port asks for all multicast frames.
const MOST_GROUPS: usize = 30;
/// The most unicast addresses beside the port's own: more than an adapter has filters for a VF.
const MOST_FILTERS: usize = 16;
/// Bytes of an 802.1Q tag, and its type.
const TAG: usize = 4;
const TAG_TYPE: [u8; 2] = [0x81, 0x00];
/// Two addresses.
const ADDRESSES: usize = 12;
/// The longest frame with a tag.
const LONGEST: usize = 9728 + TAG;

/// The rights that a driver has asked for and got since its start.
#[derive(Clone, Debug)]
struct Granted {
    promiscuous: bool,
    all_multicast: bool,
    unicast: Addresses,
    multicast: Addresses,
    vlans: BTreeSet<u16>,
}

impl Default for Granted {
    fn default() -> Self {
        let none = Addresses::Only(Vec::new());
        Self {
            promiscuous: false,
            all_multicast: false,
            unicast: none.clone(),
            multicast: none,
            vlans: BTreeSet::new(),
        }
    }
}

/// The addresses of a list that one message, or a few, can carry. None for a longer list.
fn listed(addresses: &Addresses, most: usize) -> Option<&[Mac]> {
    match addresses {
        Addresses::Only(list) if list.len() <= most => Some(list),
        _ => None,
    }
}

impl Granted {
    /// The receive modes that this needs.
    fn modes(&self) -> PromiscuousMode {
        let all_multicast = self.all_multicast || listed(&self.multicast, MOST_GROUPS).is_none();
        PromiscuousMode {
            multicast: self.promiscuous || all_multicast,
            unicast: self.promiscuous || listed(&self.unicast, MOST_FILTERS).is_none(),
        }
    }
}

/// The files of a port for the events of its thread.
struct Events {
    frames: IoEvent,
    control: IoEvent,
}

/// The wire of a NIC under a port group.
pub(super) struct PortWire {
    id: String,
    port: FramePort,
    driver: Driver,
    events: Events,
    /// The address before the first start.
    initial: Mac,
    mtu: Mtu,
    /// Whether a driver of the guest uses the device.
    used: bool,
    /// Whether the PF listens to the VF.
    started: bool,
    granted: Granted,
    /// The receive modes that the PF has.
    modes: PromiscuousMode,
    frame: Vec<u8>,
}

impl PortWire {
    /// The wire of NIC `id` with this address and MTU.
    ///
    /// # Errors
    /// Those of duplicating file descriptors.
    pub(super) fn new(
        id: &str,
        port: FramePort,
        driver: Driver,
        mac: MacAddress,
        mtu: Mtu,
    ) -> io::Result<Self> {
        let events = Events { frames: port.event()?.into(), control: port.control_event()?.into() };
        Ok(Self {
            id: id.to_owned(),
            port,
            driver,
            events,
            initial: mac.bytes(),
            mtu,
            used: false,
            started: false,
            granted: Granted::default(),
            modes: PromiscuousMode::OFF,
            frame: Vec::new(),
        })
    }

    /// Sends a request. Returns whether it was granted.
    fn ask(&mut self, request: &Request, end: Instant) -> bool {
        if !self.started || Instant::now() >= end {
            return false;
        }
        match self.driver.request(request) {
            Ok(granted) => granted,
            Err(error) => {
                tracing::debug!(nic = self.id, %error, "A port's request has no response");
                false
            }
        }
    }

    /// Resets the VF, and asks again for the rights that the guest's driver has. Those that are denied now are gone.
    fn restart(&mut self) {
        let end = Instant::now() + LIMIT;
        self.modes = PromiscuousMode::OFF;
        self.started = match self.driver.start() {
            Ok(_) => true,
            Err(error) => {
                tracing::warn!(nic = self.id, %error, "A NIC's port does not start: its link is down");
                return;
            }
        };
        if let Err(error) = self.port.arm() {
            tracing::warn!(nic = self.id, %error, "A NIC learns of revoked rights at its next request only");
        }
        // As drivers of VFs do: the relay tells the first request after a reset a denial, even if the policy asks for silence.
        if let Some(address) = self.driver.address() {
            self.ask(&Request::SetMac(address), end);
        }
        let before = std::mem::take(&mut self.granted);
        self.ask(&Request::SetMaxFrame(self.mtu.max_frame().into()), end);
        for id in before.vlans {
            if self.ask(&Request::SetVlan { vid: id, add: true }, end) {
                self.granted.vlans.insert(id);
            }
        }
        self.set_groups(before.multicast, end);
        self.set_filters(before.unicast, end);
        let lists = self.granted.clone();
        let modes = Granted { promiscuous: before.promiscuous, all_multicast: before.all_multicast, ..lists };
        self.set_modes(modes, end);
    }

    /// Sets the receive modes that `wanted` needs, and keeps it if they are granted.
    fn set_modes(&mut self, wanted: Granted, end: Instant) -> bool {
        let modes = wanted.modes();
        let done = modes == self.modes || self.ask(&Request::SetPromiscuous(modes), end);
        if done {
            (self.modes, self.granted) = (modes, wanted);
        }
        done
    }

    /// Replaces the list of multicast addresses.
    fn set_groups(&mut self, groups: Addresses, end: Instant) -> bool {
        if groups == self.granted.multicast {
            return true;
        }
        if let Some(list) = listed(&groups, MOST_GROUPS) {
            let list: Vec<MacAddress> = list.iter().copied().map(MacAddress::new).collect();
            let request = self.driver.multicast(&list);
            if !self.ask(&request, end) {
                return false;
            }
        }
        let wanted = Granted { multicast: groups, ..self.granted.clone() };
        self.set_modes(wanted, end)
    }

    /// Replaces the list of further unicast addresses. After a denial, the port has the part of the list before it.
    fn set_filters(&mut self, filters: Addresses, end: Instant) -> bool {
        if filters == self.granted.unicast {
            return true;
        }
        let none = Addresses::Only(Vec::new());
        if self.granted.unicast != none && !self.ask(&Request::ClearUnicastFilters, end) {
            return false;
        }
        let mut kept = Vec::new();
        let mut complete = true;
        for mac in listed(&filters, MOST_FILTERS).unwrap_or_default() {
            complete = self.ask(&Request::AddUnicastFilter(MacAddress::new(*mac)), end);
            if !complete {
                break;
            }
            kept.push(*mac);
        }
        let all = listed(&filters, MOST_FILTERS).is_none();
        let unicast = if all { filters } else { Addresses::Only(kept) };
        let wanted = Granted { unicast, ..self.granted.clone() };
        self.set_modes(wanted, end) && complete
    }
}

impl Policy for PortWire {
    fn source(&self) -> Option<IoSource> {
        Some(IoSource::Event(self.events.control.clone()))
    }

    fn start(&mut self) {
        self.used = true;
        self.granted = Granted::default();
        self.restart();
        self.port.open(true);
    }

    fn stop(&mut self) {
        self.port.open(false);
        if self.used {
            self.driver.stop();
        }
        (self.used, self.started) = (false, false);
    }

    fn power_on(&mut self) {
        self.driver.forget();
    }

    fn decide(&mut self, request: &Control) -> bool {
        let end = Instant::now() + LIMIT;
        match request {
            Control::Address(mac) if *mac == self.state().mac => true,
            Control::Address(mac) => self.ask(&Request::SetMac(MacAddress::new(*mac)), end),
            Control::Promiscuous(on) => {
                self.set_modes(Granted { promiscuous: *on, ..self.granted.clone() }, end)
            }
            Control::AllMulticast(on) => {
                self.set_modes(Granted { all_multicast: *on, ..self.granted.clone() }, end)
            }
            Control::Lists { unicast, multicast } => {
                let unicast = self.set_filters(unicast.clone(), end);
                self.set_groups(multicast.clone(), end) && unicast
            }
            Control::Vlan { id, add } => {
                let known = self.granted.vlans.contains(id);
                if known == *add {
                    return true;
                }
                if (*add && self.granted.vlans.len() >= MOST_VLANS)
                    || !self.ask(&Request::SetVlan { vid: *id, add: *add }, end)
                {
                    return false;
                }
                if *add {
                    self.granted.vlans.insert(*id);
                } else {
                    self.granted.vlans.remove(id);
                }
                true
            }
            Control::Pairs(_) | Control::Offloads(_) => false,
        }
    }

    fn wake(&mut self) {
        if self.used && (self.driver.needs_start() || (!self.started && self.port.link_up())) {
            self.restart();
        }
    }

    fn state(&self) -> PortState {
        let mac = self.driver.address().map_or(self.initial, MacAddress::bytes);
        PortState { mac, link_up: self.started && self.port.link_up() }
    }
}

impl Wire for PortWire {
    fn abilities(&self) -> Abilities {
        Abilities { offloads: false, vlans: true }
    }

    fn calls(&self) -> Calls {
        Calls::Port
    }

    fn policy(&mut self) -> Option<&mut dyn Policy> {
        Some(self)
    }

    fn pairs(&self) -> usize {
        1
    }

    fn source(&self, _pair: usize) -> Option<IoSource> {
        Some(IoSource::Event(self.events.frames.clone()))
    }

    fn receive(&mut self, _pair: usize, frame: &mut [u8]) -> io::Result<usize> {
        let received = self.port.take().ok_or(io::ErrorKind::WouldBlock)?;
        let (addresses, rest) = received.bytes.split_at_checked(ADDRESSES).unwrap_or_default();
        let tag = received.tag.map(|tag| {
            let [high, low] = tag.to_be_bytes();
            [TAG_TYPE[0], TAG_TYPE[1], high, low]
        });
        let tag = tag.as_ref().map_or([].as_slice(), |tag| tag.as_slice());
        let mut len = 0;
        for part in [[0; HEADER].as_slice(), addresses, tag, rest] {
            for (to, from) in frame.iter_mut().skip(len).zip(part) {
                *to = *from;
            }
            len += part.len();
        }
        Ok(len.min(frame.len()))
    }

    fn send(&mut self, _pair: usize, frame: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.frame.clear();
        for part in frame {
            let old = self.frame.len();
            if old + part.len() > HEADER + LONGEST {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            self.frame.resize(old + part.len(), 0);
            part.copy_to(self.frame.get_mut(old..).unwrap_or_default());
        }
        // A driver without offloads leaves the flags and the kind of segments zero (the specification, 5.1.6.2).
        let (Some([0, 0]), Some(bytes)) = (self.frame.get(..2), self.frame.get(HEADER..)) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        match bytes.get(ADDRESSES..ADDRESSES + TAG) {
            Some(&[0x81, 0x00, high, low]) => {
                let (head, rest) = bytes.split_at_checked(ADDRESSES).unwrap_or_default();
                let untagged = [head, rest.get(TAG..).unwrap_or_default()].concat();
                let tag = Some(u16::from_be_bytes([high, low]));
                self.port.send(Frame { tag, bytes: &untagged })
            }
            _ => self.port.send(Frame { tag: None, bytes }),
        }
    }

    fn set_offloads(&mut self, _offloads: Offloads) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn set_pairs(&mut self, _count: usize) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(test)]
mod tests;
