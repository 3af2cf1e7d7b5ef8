// SPDX-License-Identifier: Apache-2.0

//! Configuration of VFs through their PF: readable and writable settings, and changes that are made or undone together.

use std::{collections::BTreeMap, fmt, io, num::NonZeroU32};

use failpoints::{Point, reach};
use netpolicy::{Change, LinkState, MacAddress, PfCapabilities};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The Ethernet type of a VLAN tag.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum TagProtocol {
    /// The usual tag, 0x8100.
    #[default]
    #[serde(rename = "802.1Q")]
    Dot1Q,
    /// The service tag, 0x88a8.
    #[serde(rename = "802.1ad")]
    Dot1Ad,
}

/// The tag that the adapter adds to frames from a VF and strips from frames to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortVlan {
    /// The VLAN, 1 to 4094; 0 for no tag.
    pub id: u16,
    /// The priority in the tag, 0 to 7.
    #[serde(default)]
    pub qos: u8,
    /// The kind of tag.
    #[serde(default)]
    pub protocol: TagProtocol,
}

/// The link state that a VF sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VfLink {
    /// The same as the PF's.
    Auto,
    /// Up, independent of the PF's.
    Enable,
    /// Down.
    Disable,
}

/// A PF's settings for one VF. `None` if the driver does not show them; for the address it means none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VfSettings {
    /// The programmed address, chosen by the administrator or the VF; `None` for none.
    pub mac: Option<MacAddress>,
    /// The port VLAN.
    pub vlan: PortVlan,
    /// Whether frames with other source addresses are dropped.
    pub spoof_check: Option<bool>,
    /// Whether the PF driver trusts the VF.
    pub trust: Option<bool>,
    /// Guaranteed sending rate in Mbit/s; 0 for none.
    pub min_tx_rate: u32,
    /// Highest sending rate in Mbit/s; 0 for no bound.
    pub max_tx_rate: u32,
    /// The link state. Drivers that cannot set it show `Auto`.
    pub link_state: Option<VfLink>,
}

/// A change of one setting of a VF.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VfChange {
    /// The administrative address, which most drivers then prevent the VF from changing; `None` removes it.
    Mac(Option<MacAddress>),
    /// The port VLAN.
    Vlan(PortVlan),
    /// The check of source addresses.
    SpoofCheck(bool),
    /// Trust.
    Trust(bool),
    /// The rates in Mbit/s; 0 for none.
    TxRate {
        /// Guaranteed.
        min: u32,
        /// Highest.
        max: u32,
    },
    /// The link state.
    Link(VfLink),
}

impl VfChange {
    /// The change on the PF for a change of the switch; `None` for changes that go by the VF's mailbox.
    pub fn of(change: &Change) -> Option<Self> {
        Some(match change {
            Change::SetMac(mac) => Self::Mac((!mac.is_zero()).then_some(*mac)),
            Change::SetPortVlan(vlan) => Self::Vlan(vlan.map_or_else(PortVlan::default, |vlan| PortVlan {
                id: vlan.id.get(),
                qos: vlan.qos.get(),
                protocol: TagProtocol::Dot1Q,
            })),
            Change::SetSpoofCheck(on) => Self::SpoofCheck(*on),
            Change::SetTrust(on) => Self::Trust(*on),
            Change::SetMaxTxRate(rate) => Self::TxRate { min: 0, max: rate.map_or(0, NonZeroU32::get) },
            Change::SetLink(LinkState::Auto) => Self::Link(VfLink::Auto),
            Change::SetLink(LinkState::Down) => Self::Link(VfLink::Disable),
            _ => return None,
        })
    }

    /// Whether `settings` agree with this change.
    pub fn holds(&self, settings: &VfSettings) -> bool {
        match *self {
            Self::Mac(mac) => settings.mac == mac,
            // Without a tag its protocol is irrelevant; VLAN 0 with a priority is a tag.
            Self::Vlan(vlan) => {
                let untagged = |vlan: PortVlan| (vlan.id, vlan.qos) == (0, 0);
                settings.vlan == vlan || (untagged(vlan) && untagged(settings.vlan))
            }
            Self::SpoofCheck(on) => settings.spoof_check == Some(on),
            Self::Trust(on) => settings.trust == Some(on),
            Self::TxRate { min, max } => (settings.min_tx_rate, settings.max_tx_rate) == (min, max),
            Self::Link(state) => settings.link_state == Some(state),
        }
    }

    /// The change of the same kind that leads back to `settings`; `None` if they do not show this setting.
    pub fn back_to(&self, settings: &VfSettings) -> Option<Self> {
        Some(match self {
            Self::Mac(_) => Self::Mac(settings.mac),
            Self::Vlan(_) => Self::Vlan(settings.vlan),
            Self::SpoofCheck(_) => Self::SpoofCheck(settings.spoof_check?),
            Self::Trust(_) => Self::Trust(settings.trust?),
            Self::TxRate { .. } => Self::TxRate { min: settings.min_tx_rate, max: settings.max_tx_rate },
            Self::Link(_) => Self::Link(settings.link_state?),
        })
    }
}

impl fmt::Display for VfChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let switch = |on| if on { "on" } else { "off" };
        match self {
            Self::Mac(Some(mac)) => write!(f, "set the address {mac}"),
            Self::Mac(None) => write!(f, "remove the address"),
            Self::Vlan(PortVlan { id: 0, qos: 0, .. }) => write!(f, "remove the VLAN tag"),
            Self::Vlan(PortVlan { id, qos, protocol: TagProtocol::Dot1Q }) => {
                write!(f, "set VLAN {id} with priority {qos}")
            }
            Self::Vlan(PortVlan { id, qos, protocol: TagProtocol::Dot1Ad }) => {
                write!(f, "set 802.1ad VLAN {id} with priority {qos}")
            }
            Self::SpoofCheck(on) => write!(f, "switch the spoof check {}", switch(*on)),
            Self::Trust(on) => write!(f, "switch trust {}", switch(*on)),
            Self::TxRate { min: 0, max: 0 } => write!(f, "remove the rate limit"),
            Self::TxRate { min, max } => write!(f, "limit the rate to {max} Mbit/s, at least {min}"),
            Self::Link(VfLink::Auto) => write!(f, "let the link follow the PF's"),
            Self::Link(VfLink::Enable) => write!(f, "force the link up"),
            Self::Link(VfLink::Disable) => write!(f, "take the link down"),
        }
    }
}

/// The reason why a PF cannot be read or does not make a change. `pf` is its name for users.
#[derive(Debug, Error)]
pub enum PfError {
    /// The PF has no network interface, or no longer exists.
    #[error("PF {pf} has no network interface: load its driver")]
    NoInterface {
        /// The PF.
        pf: String,
    },
    /// The PF has no VF of this number.
    #[error("PF {pf} has no VF {vf}: the number of its VFs was changed, or its driver was loaded again")]
    NoVf {
        /// The PF.
        pf: String,
        /// The VF.
        vf: u16,
    },
    /// The PF's driver does not support the change.
    #[error(
        "PF {pf} cannot {change} for VF {vf}: its driver does not support it; use another setting or adapter"
    )]
    Unsupported {
        /// The PF.
        pf: String,
        /// The VF.
        vf: u16,
        /// The requested change.
        change: VfChange,
    },
    /// The driver refused.
    #[error("PF {pf} refuses to {change} for VF {vf}{}: {cure}", said(message))]
    Refused {
        /// The PF.
        pf: String,
        /// The VF.
        vf: u16,
        /// The requested change.
        change: VfChange,
        /// The kernel's message beyond the error number.
        message: Option<String>,
        /// The cure.
        cure: &'static str,
        /// The error number.
        source: io::Error,
    },
    /// The driver agreed, but shows another setting afterwards.
    #[error("PF {pf} agreed to {change} for VF {vf} but does not show it: its driver ignores the setting")]
    NotTaken {
        /// The PF.
        pf: String,
        /// The VF.
        vf: u16,
        /// The requested change.
        change: VfChange,
    },
    /// The process may not configure interfaces.
    #[error(
        "Configuring PF {pf} is not permitted: run the agent with CAP_NET_ADMIN in the PF's network namespace"
    )]
    NotPermitted {
        /// The PF.
        pf: String,
    },
    /// No answer came in time. The change may or may not have been made: read the VF.
    #[error(
        "PF {pf} did not respond in time: the kernel's network configuration is blocked (see its log), or \
         the process of a simulated PF is"
    )]
    Timeout {
        /// The PF.
        pf: String,
    },
    /// The answer makes no sense.
    #[error("PF {pf} sent an invalid response: {what}")]
    Protocol {
        /// The PF.
        pf: String,
        /// The fault in the answer.
        what: String,
    },
    /// The connection to the PF failed.
    #[error("Cannot communicate with PF {pf}")]
    Io {
        /// The PF.
        pf: String,
        /// The cause.
        source: io::Error,
    },
    /// The PF cannot be found.
    #[error(transparent)]
    Inventory(#[from] super::InventoryError),
}

fn said(message: &Option<String>) -> String {
    message.as_deref().map(|text| format!(" (\"{text}\")")).unwrap_or_default()
}

/// The reason why a series of changes was not made, and its remains.
#[derive(Debug, Error)]
#[error("Cannot {change} for VF {vf}; {}", remains(not_undone))]
pub struct ApplyError {
    /// The VF.
    pub vf: u16,
    /// The change that failed.
    pub change: VfChange,
    /// The reason.
    pub source: Box<PfError>,
    /// The changes back to the former state that failed too: these settings differ from before.
    pub not_undone: Vec<(VfChange, Box<PfError>)>,
}

fn remains(not_undone: &[(VfChange, Box<PfError>)]) -> String {
    if not_undone.is_empty() {
        return "its settings are as before".to_owned();
    }
    let failures: Vec<_> =
        not_undone.iter().map(|(change, error)| format!("could not {change}: {error}")).collect();
    format!("the rollback failed, too: {}", failures.join("; "))
}

/// Access to one PF, for the configuration of its VFs.
pub trait PfControl: Send {
    /// The PF's name for users.
    fn name(&self) -> &str;

    /// The abilities of the PF and its driver.
    ///
    /// # Errors
    /// The PF cannot be found.
    fn capabilities(&mut self) -> Result<PfCapabilities, PfError>;

    /// The settings of all VFs, by number.
    ///
    /// # Errors
    /// The PF does not answer.
    fn read_all(&mut self) -> Result<BTreeMap<u16, VfSettings>, PfError>;

    /// Makes one change. Only reading it back shows whether it took effect: see [`apply`](Self::apply).
    ///
    /// # Errors
    /// The driver's refusal. After [`PfError::Timeout`] the change may or may not have been made.
    fn set(&mut self, vf: u16, change: VfChange) -> Result<(), PfError>;

    /// The settings of one VF.
    ///
    /// # Errors
    /// [`PfError::NoVf`], or the PF does not answer.
    fn read(&mut self, vf: u16) -> Result<VfSettings, PfError> {
        let found = self.read_all()?.remove(&vf);
        found.ok_or_else(|| PfError::NoVf { pf: self.name().to_owned(), vf })
    }

    /// Makes all `changes` in their order, or none: it reads the settings back at the end, and after any failure undoes
    /// the changes in reverse order. It also makes changes that seem to hold already: an address may be the VF's own
    /// choice until the administrator sets it.
    ///
    /// # Errors
    /// The first failure, and the changes that could not be undone.
    fn apply(&mut self, vf: u16, changes: &[VfChange]) -> Result<(), ApplyError> {
        let Some(&first) = changes.first() else { return Ok(()) };
        let failed =
            |change, source| ApplyError { vf, change, source: Box::new(source), not_undone: Vec::new() };
        let before = self.read(vf).map_err(|e| failed(first, e))?;
        let mut tried = 0;
        let mut failure = None;
        for &change in changes {
            tried += 1;
            match self.set(vf, change) {
                // Read back below, like all changes.
                Ok(()) | Err(PfError::Timeout { .. }) => reach(Point::PfSet),
                Err(e) => {
                    failure = Some(failed(change, e));
                    break;
                }
            }
        }
        let (after, unread) = match self.read(vf) {
            Ok(after) => (Some(after), None),
            Err(e) => (None, Some(e)),
        };
        let not_taken = after.as_ref().and_then(|after| {
            // Only the last change of each kind counts.
            let counts = |(i, change): &(usize, &VfChange)| {
                let kind = std::mem::discriminant(*change);
                !changes.iter().skip(i + 1).any(|later| std::mem::discriminant(later) == kind)
            };
            let mut counting = changes.iter().enumerate().filter(counts).map(|(_, &change)| change);
            let change = counting.find(|change| !change.holds(after))?;
            Some(failed(change, PfError::NotTaken { pf: self.name().to_owned(), vf, change }))
        });
        // The made changes are unknown: undo all.
        let unread = unread.map(|e| failed(first, e));
        let Some(mut failure) = failure.or(not_taken).or(unread) else {
            reach(Point::PfRead);
            return Ok(());
        };
        for change in changes.iter().take(tried).rev() {
            let Some(back) = change.back_to(&before) else { continue };
            if after.as_ref().is_some_and(|after| back.holds(after)) {
                continue;
            }
            if let Err(e) = self.set(vf, back) {
                failure.not_undone.push((back, Box::new(e)));
            }
        }
        Err(failure)
    }
}

/// Restores the settings that a VF had when they were [read](PfControl::read), after its tenant is gone.
///
/// Each setting is tried, even after others failed. A former address is set again; if there was none, the tenant's is
/// removed. See [`VfSettings::without_own_mac`] for the difference between an address that the administrator had set
/// and one that the VF's own driver had chosen.
///
/// # Errors
/// The first failure, with the further ones as `not_undone`. The operation may be repeated.
pub fn restore(pf: &mut dyn PfControl, vf: u16, remembered: &VfSettings) -> Result<(), ApplyError> {
    let unread = |source| ApplyError {
        vf,
        change: VfChange::Mac(remembered.mac),
        source: Box::new(source),
        not_undone: Vec::new(),
    };
    let now = pf.read(vf).map_err(unread)?;
    // Trust first: no code that still runs may profit from the later steps.
    let kinds = [
        VfChange::Trust(false),
        VfChange::SpoofCheck(true),
        VfChange::Vlan(PortVlan::default()),
        VfChange::TxRate { min: 0, max: 0 },
        VfChange::Link(VfLink::Auto),
        VfChange::Mac(None),
    ];
    let mut failure: Option<ApplyError> = None;
    for change in kinds.iter().filter_map(|kind| kind.back_to(remembered)) {
        if change.holds(&now) {
            continue;
        }
        if let Err(e) = pf.apply(vf, &[change]) {
            match &mut failure {
                None => failure = Some(e),
                Some(first) => first.not_undone.push((e.change, e.source)),
            }
        }
    }
    failure.map_or(Ok(()), Err)
}

impl VfSettings {
    /// The settings to remember of a VF whose address may have been its own driver's choice: the PF drivers igb and
    /// ixgbe show it like one that the administrator set. `after_reset` are the settings after the VF was taken from
    /// its driver and reset: the reset removes an address of the VF's own choice and keeps the administrator's.
    ///
    /// Setting such an address again would pin it: the VF's driver, which could change it before, never could again. So
    /// it is not remembered, and the driver chooses one again when it is bound.
    #[must_use]
    pub fn without_own_mac(self, after_reset: &Self) -> Self {
        Self { mac: self.mac.filter(|_| after_reset.mac.is_some()), ..self }
    }
}
