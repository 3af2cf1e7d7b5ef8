// SPDX-License-Identifier: Apache-2.0

//! The PFs of an inventory, for the threads that control them.

use services::pf::{PfName, Pfs};
use sriov::{Bdf, PfControl, PfError};

use crate::inventory::Inventory;

/// The PFs of an inventory, each opened by its backend.
pub struct HostPfs {
    inventory: Inventory,
}

impl HostPfs {
    /// The PFs of `inventory`.
    #[must_use]
    pub fn new(inventory: Inventory) -> Self {
        Self { inventory }
    }
}

impl Pfs for HostPfs {
    fn list(&self) -> Result<Vec<PfName>, PfError> {
        let named = |(name, up)| PfName { name, up };
        Ok(self.inventory.pf_names()?.into_iter().map(named).collect())
    }

    fn address(&self, name: &str) -> Result<Bdf, PfError> {
        Ok(self.inventory.address_known_as(name)?)
    }

    fn open(&self, name: &str) -> Result<Box<dyn PfControl>, PfError> {
        self.inventory.open_pf(self.inventory.pf_known_as(name)?.device.bdf)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use services::pf::PfHandle;
    use sriov::fake::FakePf;

    use super::*;
    use crate::{backend::Hardware, inventory::tests::two_pfs};

    #[tokio::test]
    async fn a_name_that_came_to_another_pf_leads_there() {
        let (_directory, sysfs, [first, second]) = two_pfs();
        let opened = Arc::new(Mutex::new(Vec::new()));
        let note = Arc::clone(&opened);
        let open = move |bdf: Bdf| {
            note.lock().unwrap().push(bdf);
            Ok(Box::new(FakePf::new("a PF", 1)) as Box<dyn PfControl>)
        };
        let inventory = Inventory::from(Hardware::with_control(sysfs.sysfs(), Arc::new(open)));
        let handle = PfHandle::start(HostPfs::new(inventory.clone())).unwrap();
        let took = async || {
            for _ in 0..2 {
                handle.read("eth0").await.unwrap();
            }
            std::mem::take(&mut *opened.lock().unwrap())
        };
        assert_eq!(took().await, [first], "the way is kept");
        inventory.keep_names([(first, "eth0".to_owned())]);
        sysfs.rename_interface(first, "eth0", "lan0");
        sysfs.rename_interface(second, "eth1", "eth0");
        assert_eq!(took().await, [], "while its VFs are claimed");
        inventory.keep_names([]);
        assert_eq!(took().await, [second]);
    }
}
