// SPDX-License-Identifier: Apache-2.0

//! The settings that PF drivers can enforce (Linux 6.12). If a PF cannot enforce a setting, a VM that needs it does
//! not boot on it.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    policy::{EffectivePolicy, ForgedTransmits, Promiscuous, Rate, Setting, Source, VlanPolicy},
    request::Change,
};

/// The driver name of simulated PFs, which have no driver in `/sys`.
pub const SIMULATED: &str = "portcullis-sim";

/// The abilities of a PF and its driver for a VF.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PfCapabilities {
    /// The driver's name, as in `/sys`.
    pub driver: String,
    /// Spoof check can be switched.
    pub spoof_check: bool,
    /// The spoof check also drops frames of VLANs that the VF has not joined.
    pub spoof_check_covers_vlans: bool,
    /// Trust can be switched.
    pub trust: bool,
    /// A change of trust makes the PF ignore the VF until the VF's next reset message. Then trust cannot be switched on
    /// around one message of a running guest.
    pub trust_needs_reset: bool,
    /// After a reset of the PF, a VF's queues stay off until the VF's reset message, which also restores its tag.
    pub queues_wait_for_reset: bool,
    /// The adapter can tag (802.1Q).
    pub access_vlan: bool,
    /// The adapter can tag with 802.1ad.
    pub access_vlan_8021ad: bool,
    /// The VLANs that all VFs can join together; 0 where the mailbox does not decide about a guest's joining.
    pub trunk_vlans: u16,
    /// The highest sending rates that can be set; None if none can.
    pub max_tx_rate: Option<Rates>,
    /// The link can be taken down.
    pub link_state: bool,
    /// A VF can be given all multicast frames.
    pub multicast_promiscuous: bool,
    /// A VF can be given all unicast frames.
    pub unicast_promiscuous: bool,
    /// Further unicast addresses per VF.
    pub unicast_filters: u16,
    /// Further unicast addresses leave the spoof check on.
    pub unicast_filters_keep_spoof_check: bool,
    /// The state that a VF loses by its reset message.
    pub reset_clears: ResetClears,
}

/// The state that a PF's driver removes from a VF at the VF's reset message. The tables keep all other state until a
/// message has removed it.
///
/// VLANs, further addresses and the frame length are not here, though some drivers remove them. A vmm that the guest has
/// taken over may claim a reset that never was, so they count until the PF has confirmed their removal. It can set the
/// other two past its relay anyway (`docs/threat-model.md`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResetClears {
    /// Multicast hashes.
    pub multicast: bool,
    /// The reception of frames that are not addressed to the VF.
    pub promiscuous: bool,
}

/// Sending rates that a PF takes, whatever its link does now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rates {
    /// The lowest, in Mbit/s.
    pub least: u32,
    /// The highest, in Mbit/s: the fastest link of the adapter.
    pub most: u32,
}

/// A setting that a PF cannot enforce.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
#[error("Setting {setting} (from {source_level}) cannot be enforced by the PF driver {driver}: {why}")]
pub struct Unenforceable {
    /// The setting.
    pub setting: Setting,
    /// The level that it comes from.
    pub source_level: Source,
    /// The PF's driver.
    pub driver: String,
    /// The missing ability, and the cure.
    pub why: String,
}

impl PfCapabilities {
    /// Looks up a driver and, where it matters, the PF's PCI device number. An unknown driver can only set address,
    /// spoof check, trust and tag, which `iproute2` expects of all.
    #[must_use]
    pub fn of(driver: &str, device: u16) -> Self {
        match driver {
            "igb" if I82576.contains(&device) => Self::igb_82576(),
            "igb" => Self::igb_i350(),
            "ixgbe" => Self::ixgbe(),
            "i40e" => Self::i40e(),
            "ice" => Self::ice(),
            SIMULATED => Self::simulated(),
            _ => Self::unknown(driver),
        }
    }

    /// igb on an 82576: rate (while the link is up, and at most that of the link: `igb_ndo_set_vf_bw`), no link state, multicast promiscuous only.
    ///
    /// Trust is a flag for the next message (`igb_ndo_set_vf_trust`). A reset clears the multicast hashes, and the flags of
    /// the promiscuous modes (`igb_vf_reset`). All in drivers/net/ethernet/intel/igb/igb_main.c.
    #[must_use]
    pub fn igb_82576() -> Self {
        Self {
            driver: "igb".into(),
            spoof_check: true,
            spoof_check_covers_vlans: true,
            trust: true,
            trust_needs_reset: false,
            queues_wait_for_reset: true,
            access_vlan: true,
            access_vlan_8021ad: false,
            trunk_vlans: 32,
            max_tx_rate: Some(Rates { least: 1, most: 1000 }),
            link_state: false,
            multicast_promiscuous: true,
            unicast_promiscuous: false,
            unicast_filters: 3,
            unicast_filters_keep_spoof_check: true,
            reset_clears: ResetClears { multicast: true, promiscuous: true },
        }
    }

    /// igb on an i350: as the 82576, but no rate.
    #[must_use]
    pub fn igb_i350() -> Self {
        Self { max_tx_rate: None, ..Self::igb_82576() }
    }

    /// ixgbe: link state, and rates from 11 Mbit/s on a link of 10 Gbit/s (`ixgbe_ndo_set_vf_bw`). The PF itself needs
    /// one of the adapter's 64 VLANs.
    ///
    /// A change of trust revokes "clear to send" (`ixgbe_ndo_set_vf_trust`), and so does each setting of the link
    /// (`ixgbe_set_vf_link_state`), which the agent therefore sets only if it differs. So no VF with a running guest is
    /// ever trusted, and none can have a further address or a promiscuous mode, for which ixgbe requires trust. A
    /// further address would also switch the spoof check off, which netlink does not show
    /// (`ixgbe_set_vf_macvlan_msg`).
    ///
    /// A reset clears the multicast hashes and keeps the promiscuous mode (`ixgbe_vf_reset_event`). After a reset of the
    /// PF all VFs may send again (`ixgbe_set_all_vfs`), and only their reset messages restore their tags. All in
    /// drivers/net/ethernet/intel/ixgbe/ixgbe_sriov.c.
    #[must_use]
    pub fn ixgbe() -> Self {
        Self {
            driver: "ixgbe".into(),
            trust_needs_reset: true,
            queues_wait_for_reset: false,
            trunk_vlans: 63,
            max_tx_rate: Some(Rates { least: 11, most: 10_000 }),
            link_state: true,
            multicast_promiscuous: false,
            unicast_filters: 0,
            unicast_filters_keep_spoof_check: false,
            reset_clears: ResetClears { multicast: true, promiscuous: false },
            ..Self::igb_82576()
        }
    }

    /// i40e: as far as its VFs' control path allows, which is not a mailbox. It raises a lower rate to 50 Mbit/s, and
    /// refuses one above the link's speed, 40 Gbit/s at most (`i40e_set_bw_limit`). A change of trust resets the VF
    /// (`i40e_ndo_set_vf_trust`).
    #[must_use]
    pub fn i40e() -> Self {
        Self {
            driver: "i40e".into(),
            trust_needs_reset: true,
            trunk_vlans: 0,
            max_tx_rate: Some(Rates { least: 50, most: 40_000 }),
            link_state: true,
            multicast_promiscuous: false,
            unicast_filters: 0,
            reset_clears: ResetClears::default(),
            ..Self::igb_82576()
        }
    }

    /// ice: as i40e, with 802.1ad, and rates up to 100 Gbit/s (`ICE_SCHED_MAX_BW`).
    #[must_use]
    pub fn ice() -> Self {
        let max_tx_rate = Some(Rates { least: 1, most: 100_000 });
        Self { driver: "ice".into(), access_vlan_8021ad: true, max_tx_rate, ..Self::i40e() }
    }

    /// The simulated adapter: an 82576.
    #[must_use]
    pub fn simulated() -> Self {
        Self { driver: SIMULATED.into(), ..Self::igb_82576() }
    }

    /// A driver that Portcullis does not know.
    #[must_use]
    pub fn unknown(driver: &str) -> Self {
        Self {
            driver: driver.into(),
            trust_needs_reset: true,
            spoof_check_covers_vlans: false,
            trunk_vlans: 0,
            max_tx_rate: None,
            multicast_promiscuous: false,
            unicast_filters: 0,
            unicast_filters_keep_spoof_check: false,
            reset_clears: ResetClears::default(),
            ..Self::igb_82576()
        }
    }

    /// Whether the PF can make a change. If it cannot, leave out a change to "unlimited" or "link as the PF's", which
    /// its VFs have anyway; [`check`](Self::check) refuses any other before a guest starts.
    #[must_use]
    pub fn can_make(&self, change: &Change) -> bool {
        match change {
            Change::SetSpoofCheck(_) => self.spoof_check,
            Change::SetTrust(_) => self.trust,
            Change::SetPortVlan(_) => self.access_vlan,
            Change::SetMaxTxRate(_) => self.max_tx_rate.is_some(),
            Change::SetLink(_) => self.link_state,
            Change::SetPromiscuous(mode) => {
                (!mode.multicast || self.multicast_promiscuous) && (!mode.unicast || self.unicast_promiscuous)
            }
            Change::AddUnicast(_) => self.unicast_filters > 0,
            Change::JoinVlan(_) => self.trunk_vlans > 0,
            _ => true,
        }
    }

    /// Checks that the PF can enforce a policy.
    ///
    /// # Errors
    /// [`Unenforceable`] for the first setting that it cannot enforce.
    pub fn check(&self, policy: &EffectivePolicy) -> Result<(), Unenforceable> {
        let fail = |setting: Setting, why: &str| {
            let source_level = policy.source(setting);
            Err(Unenforceable { setting, source_level, driver: self.driver.clone(), why: why.into() })
        };
        let forged = policy.forged_transmits.value;
        if forged == ForgedTransmits::Reject && !self.spoof_check {
            return fail(Setting::ForgedTransmits, "it has no spoof check; accept forged transmits");
        }
        match policy.promiscuous.value {
            Promiscuous::Accept if !self.unicast_promiscuous => {
                return fail(
                    Setting::Promiscuous,
                    "a VF cannot be given all unicast frames; use multicast or reject",
                );
            }
            Promiscuous::Accept | Promiscuous::Multicast if !self.multicast_promiscuous => {
                return fail(Setting::Promiscuous, "a VF cannot be given all multicast frames; use reject");
            }
            _ => {}
        }
        match &policy.vlan.value {
            VlanPolicy::Access(_) if !self.access_vlan => {
                return fail(Setting::Vlan, "the adapter cannot tag; use none");
            }
            VlanPolicy::Access(_) if forged == ForgedTransmits::Accept && !self.queues_wait_for_reset => {
                return fail(
                    Setting::ForgedTransmits,
                    "without spoof check a VF may send without its tag after a reset of the PF; reject forged transmits",
                );
            }
            VlanPolicy::Trunk(_) if self.trunk_vlans < policy.vlan_limit.value.get().max(1) => {
                let setting = if self.trunk_vlans == 0 { Setting::Vlan } else { Setting::VlanLimit };
                return fail(
                    setting,
                    "its VFs cannot be given that many VLANs one by one; use access or a lower limit",
                );
            }
            VlanPolicy::Trunk(_) if forged == ForgedTransmits::Accept && self.spoof_check_covers_vlans => {
                return fail(
                    Setting::ForgedTransmits,
                    "without spoof check a VF sends in VLANs outside of its trunk too; reject forged transmits",
                );
            }
            _ => {}
        }
        let unicast = policy.unicast_limit.value.get();
        if unicast > self.unicast_filters {
            return fail(
                Setting::UnicastLimit,
                "a VF cannot be given that many further addresses; lower the limit",
            );
        }
        if unicast > 0 && forged == ForgedTransmits::Reject && !self.unicast_filters_keep_spoof_check {
            return fail(
                Setting::UnicastLimit,
                "a further address switches its spoof check off; set the limit to 0 or accept forged transmits",
            );
        }
        if policy.blocked.value && !self.link_state {
            return fail(Setting::Blocked, "it cannot take a VF's link down; stop the VM instead");
        }
        // The rate last: a caller that tolerates an earlier rate knows that all other settings can be enforced.
        match (policy.rate.value, self.max_tx_rate) {
            (Rate::Unlimited, _) => {}
            (Rate::MaxTxMbit(_), None) => return fail(Setting::Rate, "it has no rate limit; use unlimited"),
            (Rate::MaxTxMbit(rate), Some(Rates { least, most })) => {
                if !(least..=most).contains(&rate.get()) {
                    let why = format!(
                        "it takes {least} to {most} Mbit/s, not {rate}; use one of them, or unlimited"
                    );
                    return fail(Setting::Rate, &why);
                }
            }
        }
        Ok(())
    }
}

/// PF device numbers of the 82576 (drivers/net/ethernet/intel/igb/e1000_hw.h).
const I82576: [u16; 8] = [0x10c9, 0x10e6, 0x10e7, 0x10e8, 0x1526, 0x150a, 0x1518, 0x150d];
