// SPDX-License-Identifier: Apache-2.0

//! A PF in memory that answers like igb on an 82576.

use std::{collections::BTreeMap, io};

use netpolicy::{MacAddress, PfCapabilities};

use crate::control::{PfControl, PfError, TagProtocol, VfChange, VfLink, VfSettings};

/// A PF in memory that answers like igb on an 82576 whose link is up.
#[derive(Debug)]
pub struct FakePf {
    name: String,
    vfs: BTreeMap<u16, VfSettings>,
    /// Every change that was made.
    pub made: Vec<(u16, VfChange)>,
    /// The result of each of the next changes: `Some` fails with this error number, `None` lets it pass.
    pub answers: Vec<Option<i32>>,
    /// Acknowledges changes without making them.
    pub deaf: bool,
    /// Answers nothing.
    pub silent: bool,
}

impl FakePf {
    /// A PF with `count` VFs as igb makes them: no address, spoof check on, trust off.
    pub fn new(name: &str, count: u16) -> Self {
        let fresh = VfSettings {
            spoof_check: Some(true),
            trust: Some(false),
            link_state: Some(VfLink::Auto),
            ..VfSettings::default()
        };
        Self {
            name: name.to_owned(),
            vfs: (0..count).map(|vf| (vf, fresh.clone())).collect(),
            made: Vec::new(),
            answers: Vec::new(),
            deaf: false,
            silent: false,
        }
    }

    /// The VF's driver chooses an address.
    pub fn choose_mac(&mut self, vf: u16, mac: MacAddress) {
        if let Some(settings) = self.vfs.get_mut(&vf) {
            settings.mac = Some(mac);
        }
    }

    fn refused(&self, vf: u16, change: VfChange, number: i32) -> PfError {
        PfError::Refused {
            pf: self.name.clone(),
            vf,
            change,
            message: None,
            cure: "this is a test",
            source: io::Error::from_raw_os_error(number),
        }
    }
}

impl PfControl for FakePf {
    fn name(&self) -> &str {
        &self.name
    }

    fn capabilities(&mut self) -> Result<PfCapabilities, PfError> {
        Ok(PfCapabilities::igb_82576())
    }

    fn read_all(&mut self) -> Result<BTreeMap<u16, VfSettings>, PfError> {
        if self.silent {
            return Err(PfError::Timeout { pf: self.name.clone() });
        }
        Ok(self.vfs.clone())
    }

    fn set(&mut self, vf: u16, change: VfChange) -> Result<(), PfError> {
        if self.silent {
            return Err(PfError::Timeout { pf: self.name.clone() });
        }
        if !self.answers.is_empty()
            && let Some(number) = self.answers.remove(0)
        {
            return Err(self.refused(vf, change, number));
        }
        let bad = match change {
            VfChange::Link(_) => {
                return Err(PfError::Unsupported { pf: self.name.clone(), vf, change });
            }
            VfChange::Vlan(vlan) if vlan.protocol == TagProtocol::Dot1Ad => {
                return Err(PfError::Unsupported { pf: self.name.clone(), vf, change });
            }
            VfChange::Vlan(vlan) => vlan.id > 4095 || vlan.qos > 7,
            VfChange::Mac(Some(mac)) => !mac.is_unicast(),
            VfChange::TxRate { min, .. } => min != 0,
            _ => false,
        };
        let Some(settings) = self.vfs.get_mut(&vf).filter(|_| !bad) else {
            return Err(self.refused(vf, change, libc::EINVAL));
        };
        self.made.push((vf, change));
        if self.deaf {
            return Ok(());
        }
        match change {
            VfChange::Mac(mac) => settings.mac = mac,
            VfChange::Vlan(vlan) => settings.vlan = vlan,
            VfChange::SpoofCheck(on) => settings.spoof_check = Some(on),
            VfChange::Trust(on) => settings.trust = Some(on),
            VfChange::TxRate { max, .. } => settings.max_tx_rate = max,
            VfChange::Link(state) => settings.link_state = Some(state),
        }
        Ok(())
    }
}
