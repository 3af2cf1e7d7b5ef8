// SPDX-License-Identifier: Apache-2.0

//! The simulated PF: the behaviour of an igb PF driver and an 82576 towards VFs, without any I/O
//! ([`SimPfState`]), and the process around it ([`serve`]).

mod mailbox;
mod rate;
mod serve;
mod switch;
mod tap;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use netpolicy::MacAddress;
use sriov::{PortVlan, TagProtocol, VfChange, VfLink, VfSettings};

use self::rate::TxRateLimit;
pub use self::{
    serve::{Options, listen, serve},
    switch::Port,
    tap::open_tap,
};
pub use super::wire::Frame;
use super::{address::MAX_VFS, control::VfCounters};

/// Entries of the adapter's address table (RAL/RAH). Its VFs share the entries that igb leaves over for further
/// addresses.
const ADDRESS_TABLE: usize = 24;
const RESERVED_ADDRESSES: usize = 4;
/// The fewest further addresses for all VFs together.
const MIN_FILTERS: usize = 3;
/// VLANs that all VFs can join together (VLVF).
const VLAN_TABLE: usize = 32;
/// The longest frame in bytes that a VF receives before it has set the length: 1518 and a tag.
const DEFAULT_MAX_FRAME: u32 = 1522;
/// Speed of the link in Mbit/s.
pub const LINK_SPEED: u32 = 1000;

/// The PF's state of one VF.
#[derive(Clone, Debug)]
struct Vf {
    /// Programmed address; zero for none.
    mac: MacAddress,
    /// Set by the administrator: the VF may not change it unless it is trusted.
    mac_latched: bool,
    trusted: bool,
    spoof_check: bool,
    port_vlan: PortVlan,
    /// Highest sending rate in Mbit/s, 0 for none.
    max_tx_rate: u32,
    bucket: TxRateLimit,
    /// A reset was answered: queues are enabled, and the PF listens to messages.
    clear_to_send: bool,
    last_nack: Option<Duration>,
    /// The VF's own number: igb does not bound it.
    multicast_count: u8,
    multicast: Vec<u16>,
    promiscuous_multicast: bool,
    vlans: BTreeSet<u16>,
    /// Further addresses. They outlive resets.
    filters: Vec<MacAddress>,
    max_frame: u32,
    counters: VfCounters,
}

impl Default for Vf {
    fn default() -> Self {
        Self {
            mac: MacAddress::ZERO,
            mac_latched: false,
            trusted: false,
            spoof_check: true,
            port_vlan: PortVlan::default(),
            max_tx_rate: 0,
            bucket: TxRateLimit::default(),
            clear_to_send: false,
            last_nack: None,
            multicast_count: 0,
            multicast: Vec::new(),
            promiscuous_multicast: false,
            vlans: BTreeSet::new(),
            filters: Vec::new(),
            max_frame: DEFAULT_MAX_FRAME,
            counters: VfCounters::default(),
        }
    }
}

/// The PF's state. The caller supplies the time: monotonic, since some fixed moment.
#[derive(Clone, Debug)]
pub struct SimPfState {
    vfs: Vec<Vf>,
    link_up: bool,
    scratch: Vec<u8>,
}

impl SimPfState {
    /// A PF with `vfs` VFs ([`MAX_VFS`] at most) as igb makes them: no address, spoof check on, trust off.
    #[must_use]
    pub fn new(vfs: u16) -> Self {
        let count = usize::from(vfs.min(MAX_VFS));
        Self { vfs: vec![Vf::default(); count], link_up: true, scratch: Vec::new() }
    }

    /// The number of VFs.
    #[must_use]
    pub fn vf_count(&self) -> u16 {
        u16::try_from(self.vfs.len()).unwrap_or(MAX_VFS)
    }

    /// Whether the link is up.
    #[must_use]
    pub fn link_up(&self) -> bool {
        self.link_up
    }

    /// Takes the link up or down. The caller must send the VFs the link state and a [ping](Self::ping).
    pub fn set_link(&mut self, up: bool) {
        self.link_up = up;
    }

    /// The settings of all VFs, as netlink shows those of igb.
    #[must_use]
    pub fn settings(&self) -> BTreeMap<u16, VfSettings> {
        let of = |vf: &Vf| VfSettings {
            mac: Some(vf.mac).filter(|mac| !mac.is_zero()),
            vlan: vf.port_vlan,
            spoof_check: Some(vf.spoof_check),
            trust: Some(vf.trusted),
            min_tx_rate: 0,
            max_tx_rate: vf.max_tx_rate,
            link_state: Some(VfLink::Auto),
        };
        (0..).zip(self.vfs.iter().map(of)).collect()
    }

    /// Counters of all VFs.
    #[must_use]
    pub fn counters(&self) -> BTreeMap<u16, VfCounters> {
        (0..).zip(self.vfs.iter().map(|vf| vf.counters)).collect()
    }

    /// Notes that a frame for the VF could not be handed over.
    pub fn lost(&mut self, vf: u16) {
        if let Some(vf) = self.vf(vf) {
            vf.counters.received = vf.counters.received.saturating_sub(1);
            vf.counters.lost = vf.counters.lost.saturating_add(1);
        }
    }

    /// Makes a change of the administrator.
    ///
    /// # Errors
    /// The error number of igb's functions: `ENODEV` without such a VF (as in netlink), `EINVAL`, `EOPNOTSUPP`,
    /// `EPROTONOSUPPORT`.
    pub fn set(&mut self, vf: u16, change: VfChange) -> Result<(), i32> {
        let link_up = self.link_up;
        let vf = self.vf(vf).ok_or(libc::ENODEV)?;
        match change {
            VfChange::Mac(Some(mac)) if !mac.is_assignable() => return Err(libc::EINVAL),
            // Programmed at once. The VF gets neither an event nor a reset.
            VfChange::Mac(Some(mac)) => (vf.mac, vf.mac_latched) = (mac, true),
            VfChange::Mac(None) => (vf.mac, vf.mac_latched) = (MacAddress::ZERO, false),
            VfChange::Vlan(vlan) if vlan.protocol != TagProtocol::Dot1Q => return Err(libc::EPROTONOSUPPORT),
            VfChange::Vlan(vlan) if vlan.id > 4094 || vlan.qos > 7 => return Err(libc::EINVAL),
            VfChange::Vlan(vlan) if vlan.id == 0 => vf.port_vlan = PortVlan::default(),
            VfChange::Vlan(vlan) => vf.port_vlan = vlan,
            VfChange::SpoofCheck(on) => vf.spoof_check = on,
            VfChange::Trust(on) => vf.trusted = on,
            VfChange::TxRate { min, max } if min != 0 || max > LINK_SPEED || !link_up => {
                return Err(libc::EINVAL);
            }
            VfChange::TxRate { max, .. } => {
                vf.max_tx_rate = max;
                vf.bucket = TxRateLimit::default();
            }
            VfChange::Link(_) => return Err(libc::EOPNOTSUPP),
        }
        Ok(())
    }

    fn vf(&mut self, vf: u16) -> Option<&mut Vf> {
        self.vfs.get_mut(usize::from(vf))
    }

    /// The most further addresses of all VFs together.
    fn filter_room(&self) -> usize {
        (ADDRESS_TABLE - RESERVED_ADDRESSES).saturating_sub(self.vfs.len()).max(MIN_FILTERS)
    }

    /// Whether one more VLAN has room in the table.
    fn has_room_for_vlan(&self, vlan: u16) -> bool {
        let port_vlans = self.vfs.iter().map(|vf| vf.port_vlan.id).filter(|id| *id != 0);
        let used: BTreeSet<u16> =
            self.vfs.iter().flat_map(|vf| vf.vlans.iter().copied()).chain(port_vlans).collect();
        used.contains(&vlan) || used.len() < VLAN_TABLE
    }
}
