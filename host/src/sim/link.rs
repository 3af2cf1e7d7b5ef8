// SPDX-License-Identifier: Apache-2.0

//! The agent's control of a simulated PF, which survives the end of the PF's process.

use std::{collections::BTreeMap, sync::Arc};

use netpolicy::PfCapabilities;
use simnic::SimPf;
use sriov::{Bdf, PfControl, PfError, VfChange, VfSettings};

use super::Simulated;

/// A `PfControl` that connects again when the process of its PF has ended, which netlink never has
/// to do. All calls may be repeated.
pub(super) struct Link {
    simulated: Arc<Simulated>,
    bdf: Bdf,
    name: String,
    /// None after a response that did not come: a late one would be taken for that of the next
    /// call.
    pf: Option<SimPf>,
}

impl Link {
    pub(super) fn open(simulated: Arc<Simulated>, bdf: Bdf) -> Result<Self, PfError> {
        let pf = simulated.connect(bdf)?;
        Ok(Self { simulated, bdf, name: pf.about().name.clone(), pf: Some(pf) })
    }

    fn call<T>(&mut self, call: impl Fn(&mut SimPf) -> Result<T, PfError>) -> Result<T, PfError> {
        if let Some(mut pf) = self.pf.take() {
            match call(&mut pf) {
                Err(PfError::Io { .. }) => {}
                Err(error @ (PfError::Timeout { .. } | PfError::Protocol { .. })) => return Err(error),
                result => {
                    self.pf = Some(pf);
                    return result;
                }
            }
        }
        let mut pf = self.simulated.connect(self.bdf)?;
        let result = call(&mut pf);
        if !matches!(result, Err(PfError::Io { .. } | PfError::Timeout { .. } | PfError::Protocol { .. })) {
            self.pf = Some(pf);
        }
        result
    }
}

impl PfControl for Link {
    fn name(&self) -> &str {
        &self.name
    }

    fn capabilities(&mut self) -> Result<PfCapabilities, PfError> {
        self.call(SimPf::capabilities)
    }

    fn read_all(&mut self) -> Result<BTreeMap<u16, VfSettings>, PfError> {
        self.call(SimPf::read_all)
    }

    fn set(&mut self, vf: u16, change: VfChange) -> Result<(), PfError> {
        self.call(|pf| pf.set(vf, change))
    }
}
