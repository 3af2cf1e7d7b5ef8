// SPDX-License-Identifier: Apache-2.0

//! A NIC under a port group: a virtio network device on a simulated VF.
//!
//! ```text
//!   driver ─▶ control queue ─▶ PortWire::decide ─▶ Driver ─▶ relay ─▶ agent, PF
//!   driver ◀▶ other queues  ◀▶ PortWire ◀▶ FramePort ◀▶ PF
//! ```
//!
//! The wire drives the VF as the driver of a guest would: each request of the control queue becomes messages to the relay,
//! which decides about them as about those of an assigned VF. The PF enforces the address and the access VLAN outside of this
//! process, and the relay the rest, as for an assigned VF.

use std::{
    collections::BTreeSet,
    io,
    time::{Duration, Instant},
};

use devices::io_thread::{Calls, IoEvent, IoSource, IoTimer};
use netpolicy::{MacAddress, Mtu, PromiscuousMode, Request};
use passthrough::relay::Driver;
use simnic::{Frame, vf::FramePort};
use virtio::net::{
    Abilities, HEADER, Offloads, Policy, PortState, Wire,
    control::{Addresses, Mac, Request as Control},
};
use vm_memory::VolatileSlice;

/// The most time for the messages of one request, beside the last message. The relay takes up to 0.85 s for one of them.
const LIMIT: Duration = Duration::from_millis(1200);
/// The time between two looks for messages of the PF, as in the drivers of VFs.
const LOOK: Duration = Duration::from_secs(2);
/// The most VLANs that a port joins: an 82576 has 32 filters for all VFs.
const MOST_VLANS: usize = 64;
/// The most multicast addresses in one message. With more of them, a port asks for all multicast frames.
const MOST_GROUPS: usize = 30;
/// The most further unicast addresses: an 82576 has 24 filters for all VFs. With more of them, a port asks for all frames.
const MOST_FILTERS: usize = 16;
/// Bytes of an 802.1Q tag, and its type.
const TAG: usize = 4;
const TAG_TYPE: [u8; 2] = [0x81, 0x00];
/// Two addresses.
const ADDRESSES: usize = 12;
/// The longest frame with a tag.
const LONGEST: usize = 9728 + TAG;

/// The receive state of a driver.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Wanted {
    promiscuous: bool,
    all_multicast: bool,
    unicast: Addresses,
    multicast: Addresses,
    vlans: BTreeSet<u16>,
}

impl Default for Wanted {
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

/// The addresses of a list that messages can carry. None for a longer list.
fn listed(addresses: &Addresses, most: usize) -> Option<&[Mac]> {
    match addresses {
        Addresses::Only(list) if list.len() <= most => Some(list),
        _ => None,
    }
}

impl Wanted {
    /// The receive modes that this needs.
    fn modes(&self) -> PromiscuousMode {
        let all_multicast = self.all_multicast || listed(&self.multicast, MOST_GROUPS).is_none();
        PromiscuousMode {
            multicast: self.promiscuous || all_multicast,
            unicast: self.promiscuous || listed(&self.unicast, MOST_FILTERS).is_none(),
        }
    }
}

/// The receive state of the VF, as far as the PF has confirmed it. A part is None after a request of which the result is not
/// known, or is only a part of a list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Programmed {
    modes: Option<PromiscuousMode>,
    unicast: Option<Vec<Mac>>,
    multicast: Option<Vec<Mac>>,
}

/// The end of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Granted,
    Denied,
    /// It was not sent in time, or has no response.
    None,
}

/// The events of a port for its thread.
struct Events {
    frames: IoEvent,
    control: IoEvent,
    look: IoTimer,
}

/// The wire of a NIC under a port group.
pub(super) struct PortWire {
    id: String,
    port: FramePort,
    driver: Driver,
    events: Events,
    /// The address at power-on.
    initial: Mac,
    mtu: Mtu,
    /// Whether the VF has not been started since power-on.
    fresh: bool,
    /// Whether a driver of the guest uses the device.
    used: bool,
    /// Whether the PF listens to the VF.
    started: bool,
    /// Whether the VF must be started again.
    lost: bool,
    /// The receive state that the guest's driver has been granted.
    granted: Wanted,
    /// A state that is to be asked for again after a restart of the VF.
    owed: Option<Wanted>,
    programmed: Programmed,
    /// Whether the log has a failed start since the last good one.
    warned: bool,
    frame: Vec<u8>,
}

impl PortWire {
    /// The wire of NIC `id` with this address and MTU.
    ///
    /// # Errors
    /// Those of duplicating file descriptors and of timers.
    pub(super) fn new(
        id: &str,
        port: FramePort,
        driver: Driver,
        mac: MacAddress,
        mtu: Mtu,
    ) -> io::Result<Self> {
        let look = IoTimer::new()?;
        look.set(LOOK)?;
        let events = Events { frames: port.event()?.into(), control: port.control_event()?.into(), look };
        Ok(Self {
            id: id.to_owned(),
            port,
            driver,
            events,
            initial: mac.bytes(),
            mtu,
            fresh: true,
            used: false,
            started: false,
            lost: false,
            granted: Wanted::default(),
            owed: None,
            programmed: Programmed::default(),
            warned: false,
            frame: Vec::new(),
        })
    }

    /// Sends a request.
    fn request(&mut self, request: &Request, end: Instant) -> Verdict {
        if !self.started || self.lost || self.port.is_gone() || Instant::now() >= end {
            return Verdict::None;
        }
        match self.driver.request(request) {
            Ok(answer) => {
                if answer.needs_start {
                    self.lost = true;
                    self.events.control.signal();
                }
                if answer.granted { Verdict::Granted } else { Verdict::Denied }
            }
            Err(error) => {
                tracing::debug!(nic = self.id, %error, "A port's request has no response");
                Verdict::None
            }
        }
    }

    /// Resets the VF. What the guest's driver had before is owed to it.
    fn restart(&mut self) {
        if self.port.is_gone() {
            self.started = false;
            return;
        }
        let end = Instant::now() + LIMIT;
        // A VF has no mode after its reset. Its filters may be those of an earlier driver.
        self.programmed = Programmed { modes: Some(PromiscuousMode::OFF), ..Programmed::default() };
        self.lost = false;
        let before = std::mem::take(&mut self.granted);
        match &mut self.owed {
            // An earlier restart has not got everything back.
            Some(owed) => owed.vlans.extend(before.vlans),
            None => self.owed = Some(before),
        }
        if let Err(error) = self.driver.start() {
            self.started = false;
            // A guest may cause any number of them.
            if !std::mem::replace(&mut self.warned, true) {
                tracing::warn!(nic = self.id, %error, "A NIC's port does not start: its link is down");
            }
            return;
        }
        (self.started, self.warned, self.fresh) = (true, false, false);
        if let Err(error) = self.port.arm() {
            // A guest may cause any number of them.
            tracing::debug!(nic = self.id, %error, "A NIC looks for revoked rights every two seconds only");
        }
        // As drivers of VFs do. The relay nacks a denied first request after a reset, even if the policy asks for silence.
        if let Some(address) = self.driver.address() {
            self.request(&Request::SetMac(address), end);
        }
        self.request(&Request::SetMaxFrame(self.mtu.max_frame().into()), end);
        self.pay(end);
    }

    /// Asks for the state that is owed, and keeps the rest for the next time when the time is over. Returns whether all of it was
    /// granted.
    fn pay(&mut self, end: Instant) -> bool {
        let Some(mut owed) = self.owed.take() else { return true };
        let mut done = true;
        while let Some(id) = owed.vlans.pop_first() {
            match self.request(&Request::SetVlan { vid: id, add: true }, end) {
                Verdict::Granted => {
                    self.granted.vlans.insert(id);
                }
                Verdict::Denied => done = false,
                Verdict::None => {
                    owed.vlans.insert(id);
                    self.owed = Some(owed);
                    return false;
                }
            }
        }
        let wanted = Wanted { vlans: self.granted.vlans.clone(), ..owed };
        done &= self.receive_state(wanted.clone(), end);
        if !done && (self.lost || Instant::now() >= end) {
            self.owed = Some(Wanted { vlans: BTreeSet::new(), ..wanted });
        }
        done
    }

    /// Sets the receive state but for VLANs. Returns whether all of it was granted. The guest's driver keeps what was granted
    /// before a denial.
    fn receive_state(&mut self, wanted: Wanted, end: Instant) -> bool {
        let (modes, now) = (wanted.modes(), self.programmed.modes.unwrap_or_default());
        // A mode comes before the end of the filters that it replaces, and ends after the filters are there.
        let more = PromiscuousMode {
            multicast: modes.multicast || now.multicast,
            unicast: modes.unicast || now.unicast,
        };
        if !self.set_modes(more, end) {
            return false;
        }
        let filters = listed(&wanted.unicast, MOST_FILTERS);
        let filters = filters.is_none_or(|filters| self.set_filters(filters, end));
        let groups = listed(&wanted.multicast, MOST_GROUPS);
        let groups = groups.is_none_or(|groups| self.set_groups(groups, end));
        let done = self.set_modes(modes, end) && filters && groups;
        self.granted = wanted;
        done
    }

    fn set_modes(&mut self, modes: PromiscuousMode, end: Instant) -> bool {
        if self.programmed.modes == Some(modes) {
            return true;
        }
        match self.request(&Request::SetPromiscuous(modes), end) {
            Verdict::Granted => self.programmed.modes = Some(modes),
            Verdict::Denied => return false,
            Verdict::None => {
                self.programmed.modes = None;
                return false;
            }
        }
        true
    }

    /// Replaces the list of multicast addresses.
    fn set_groups(&mut self, groups: &[Mac], end: Instant) -> bool {
        if self.programmed.multicast.as_deref() == Some(groups) {
            return true;
        }
        let list: Vec<MacAddress> = groups.iter().copied().map(MacAddress::new).collect();
        let request = self.driver.multicast(&list);
        let done = self.request(&request, end) == Verdict::Granted;
        self.programmed.multicast = done.then(|| groups.to_vec());
        done
    }

    /// Replaces the list of further unicast addresses. A denied address does not keep the others out.
    fn set_filters(&mut self, filters: &[Mac], end: Instant) -> bool {
        if self.programmed.unicast.as_deref() == Some(filters) {
            return true;
        }
        // Also if there should be none: the PF keeps those of an earlier driver.
        let mut done = self.request(&Request::ClearUnicastFilters, end) == Verdict::Granted;
        for mac in filters {
            let add = Request::AddUnicastFilter(MacAddress::new(*mac));
            done &= self.request(&add, end) == Verdict::Granted;
        }
        self.programmed.unicast = done.then(|| filters.to_vec());
        done
    }

    fn set_vlan(&mut self, id: u16, add: bool, end: Instant) -> bool {
        if self.granted.vlans.contains(&id) == add {
            return true;
        }
        if add && self.granted.vlans.len() >= MOST_VLANS {
            return false;
        }
        let done = self.request(&Request::SetVlan { vid: id, add }, end) == Verdict::Granted;
        match (done, add) {
            (true, true) => drop(self.granted.vlans.insert(id)),
            (true, false) => drop(self.granted.vlans.remove(&id)),
            (false, _) => {}
        }
        done
    }
}

impl Policy for PortWire {
    fn sources(&self) -> Vec<IoSource> {
        vec![IoSource::Event(self.events.control.clone()), IoSource::Timer(self.events.look.clone())]
    }

    fn start(&mut self) {
        self.used = true;
        (self.granted, self.owed) = (Wanted::default(), None);
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
        self.fresh = true;
    }

    fn decide(&mut self, request: &Control) -> bool {
        let end = Instant::now() + LIMIT;
        // The driver's last word counts, not the one before a restart.
        let now = self.owed.clone().unwrap_or_else(|| self.granted.clone());
        let wanted = match request {
            Control::Address(mac) if *mac == self.state().mac => return true,
            Control::Address(mac) => {
                return self.request(&Request::SetMac(MacAddress::new(*mac)), end) == Verdict::Granted;
            }
            Control::Vlan { id, add } => {
                if let Some(owed) = &mut self.owed {
                    owed.vlans.remove(id);
                }
                return self.set_vlan(*id, *add, end);
            }
            Control::Promiscuous(on) => Wanted { promiscuous: *on, ..now },
            Control::AllMulticast(on) => Wanted { all_multicast: *on, ..now },
            Control::Lists { unicast, multicast } => {
                Wanted { unicast: unicast.clone(), multicast: multicast.clone(), ..now }
            }
            Control::Pairs(_) | Control::Offloads(_) => return false,
        };
        if let Some(owed) = &mut self.owed {
            let vlans = std::mem::take(&mut owed.vlans);
            *owed = Wanted { vlans, ..wanted };
            return self.pay(end);
        }
        self.receive_state(wanted, end)
    }

    fn wake(&mut self) {
        // It fails only for a time that no clock has.
        let _ = self.events.look.set(LOOK);
        if !self.used {
            return;
        }
        if self.lost || !self.started || self.driver.needs_start() {
            self.restart();
        } else {
            self.pay(Instant::now() + LIMIT);
        }
    }

    fn state(&self) -> PortState {
        let known = self.driver.address().filter(|_| !self.fresh);
        let mac = known.map_or(self.initial, MacAddress::bytes);
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

    fn take_dropped(&mut self) -> u64 {
        self.port.take_dropped()
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
