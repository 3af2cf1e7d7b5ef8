// SPDX-License-Identifier: Apache-2.0

//! PFs and VFs as the API shows them, and the number of a PF's VFs.

use std::collections::BTreeMap;

use api::{
    Caller, Missing,
    problem::{Problem, ProblemCode},
    types::{Bdf, EventKind, ObjectKind, ObjectRef, Pf, PfSpec, PfStatus, Subject, Timestamp, Vf, host_id},
};
use services::problem::ToProblem;
use sriov::{PfError, VfSettings};
use store::{Entry, Expect, StoreError};
use text::chain;
use tracing::Span;
use uuid::Uuid;

use super::{backend::Agent, view};
use crate::{
    backend::Facts,
    inventory::Inventory,
    vm::record::{Claim, PfRecord},
};

impl Agent {
    /// Runs work on the host's devices on a thread that may block.
    async fn host<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inventory) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        let (inventory, span) = (self.env.inventory.clone(), Span::current());
        tokio::task::spawn_blocking(move || span.in_scope(|| work(&inventory)))
            .await
            .map_err(|error| Problem::new(ProblemCode::Internal, chain(&error)))?
    }

    async fn pf(&self, name: String) -> Result<sriov::Pf, Problem> {
        self.host(move |inventory| find_pf(inventory, &name)).await
    }

    async fn view_pf(&self, pf: sriov::Pf, claims: &[Claim]) -> Result<Pf, Problem> {
        let bdf: Bdf = convert(pf.device.bdf)?;
        let id = host_id(bdf);
        let entry = match self.env.pfs.get(id).await {
            Ok(entry) => entry,
            Err(StoreError::NotFound { .. }) => {
                let value = PfRecord { created: Timestamp::now(), vfs: u32::from(pf.num_vfs) };
                let put = self.env.pfs.put(id, &bdf.to_string(), &value, Expect::Absent).await;
                match put {
                    Ok(revision) => Entry { id, name: bdf.to_string(), revision, value },
                    // Another request has stored it first.
                    Err(StoreError::Conflict { .. }) => {
                        self.env.pfs.get(id).await.map_err(|e| e.problem())?
                    }
                    Err(error) => return Err(error.problem()),
                }
            }
            Err(error) => return Err(error.problem()),
        };
        let facts = self.env.inventory.backend(pf.device.bdf).map_err(|e| e.problem())?.facts();
        let in_use = |claim: &&Claim| claim.adapter.as_ref().is_some_and(|vf| vf.pf == pf.device.bdf);
        Ok(Pf {
            id,
            name: pf.name(),
            revision: entry.revision,
            created: entry.value.created,
            spec: PfSpec { vfs: if facts.stores_vf_count { pf.num_vfs.into() } else { entry.value.vfs } },
            status: PfStatus {
                bdf,
                driver: pf.device.driver.clone(),
                simulated: facts.shown_as_simulated,
                device: format!("{:04x}:{:04x}", pf.device.vendor, pf.device.device),
                mac: pf.interface().and_then(|interface| interface.mac.clone()),
                up: pf.interface().is_some_and(|interface| interface.admin_up),
                carrier: pf
                    .interface()
                    .filter(|interface| interface.admin_up)
                    .map(|interface| interface.carrier),
                mtu: pf.interface().map(|interface| interface.mtu),
                vfs: u32::from(pf.num_vfs),
                vfs_in_use: u32::try_from(claims.iter().filter(in_use).count()).unwrap_or(u32::MAX),
                max_vfs: u32::from(pf.total_vfs),
            },
        })
    }

    pub(super) async fn show_pfs(&self) -> Result<Vec<Pf>, Problem> {
        let claims = self.claims().await?;
        let mut pfs = Vec::new();
        for pf in self.host(|inventory| inventory.pfs().map_err(|e| e.problem())).await? {
            pfs.push(self.view_pf(pf, &claims).await?);
        }
        pfs.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(pfs)
    }

    pub(super) async fn show_pf(&self, pf: &ObjectRef) -> Result<Pf, Problem> {
        let pf = self.pf(pf_name(pf)).await?;
        self.view_pf(pf, &self.claims().await?).await
    }

    pub(super) async fn show_vfs(&self) -> Result<Vec<Vf>, Problem> {
        // A VM that is about to open a function has claimed it.
        let (claims, used) = {
            let _guard = self.env.claiming.lock().await;
            let claims = self.claims().await?;
            let taken: Vec<sriov::Bdf> = claims.iter().map(|claim| claim.bdf).collect();
            (claims, self.host(move |inventory| usages(inventory, &taken)).await?)
        };
        let mut vfs = self
            .host(move |inventory| {
                let mut vfs = Vec::new();
                for pf in inventory.pfs().map_err(|e| e.problem())? {
                    let backend = inventory.backend(pf.device.bdf).map_err(|e| e.problem())?;
                    let settings = backend.open_pf(pf.device.bdf).and_then(|mut pf| pf.read_all());
                    for vf in inventory.vfs_of(pf.device.bdf).map_err(|e| e.problem())? {
                        let used_by = used.get(&vf.device.bdf).cloned();
                        vfs.push(Vf { used_by, ..view_vf(backend.facts(), &pf, &vf, &settings, &claims)? });
                    }
                }
                Ok(vfs)
            })
            .await?;
        vfs.sort_by(|a, b| (&a.pf, a.index).cmp(&(&b.pf, b.index)));
        Ok(vfs)
    }

    pub(super) async fn change_vfs(
        self,
        caller: Caller,
        pf: ObjectRef,
        count: u32,
        expect: Option<u64>,
    ) -> Result<Pf, Problem> {
        // Held until the count has changed, so that no VM claims a VF that is about to go.
        let _guard = self.env.claiming.lock().await;
        let found = self.pf(pf_name(&pf)).await?;
        let claims = self.claims().await?;
        let now = self.view_pf(found.clone(), &claims).await?;
        if let Some(expected) = expect.filter(|expected| *expected != now.revision) {
            return Err(Problem::revision_mismatch(expected, now.revision));
        }
        let bdf = found.device.bdf;
        let vfs = self.host(move |inventory| inventory.vfs_of(bdf).map_err(|e| e.problem())).await?;
        // Includes VFs that VMs hold as plain devices.
        let holds = |claim: &&Claim| vfs.iter().any(|vf| vf.device.bdf == claim.bdf);
        if let Some(claim) = claims.iter().find(holds).filter(|_| count != u32::from(found.num_vfs)) {
            let detail = format!(
                "VF {} of PF {} belongs to the VM {}: stop the VMs that use its VFs first.",
                claim.bdf, now.name, claim.vm_name
            );
            return Err(Problem::new(ProblemCode::VfsInUse, detail));
        }
        let backend = self.env.inventory.backend(bdf).map_err(|e| e.problem())?;
        backend.set_num_vfs(&found, count).await?;
        let value = PfRecord { created: now.created, vfs: count };
        let name = now.status.bdf.to_string();
        let put = self.env.pfs.put(now.id, &name, &value, Expect::Revision(now.revision)).await;
        let revision = put.map_err(|e| e.problem())?;
        let object = Subject { kind: ObjectKind::Pf, id: now.id, name: now.name.clone() };
        self.env.tell(EventKind::Changed { object, revision, by: Some(caller.to_string()) });
        tracing::info!(pf = %now.name, count, by = %caller, "number of VFs changed");
        let found = self.pf(bdf.to_string()).await?;
        self.view_pf(found, &claims).await
    }
}

fn convert(bdf: sriov::Bdf) -> Result<Bdf, Problem> {
    bdf.to_string().parse().map_err(|error: api::types::Invalid| {
        Problem::new(ProblemCode::Internal, format!("The API cannot name the function {bdf}: {error}"))
    })
}

fn find_pf(inventory: &Inventory, name: &str) -> Result<sriov::Pf, Problem> {
    let found = match Uuid::try_parse(name) {
        Ok(id) => {
            let pfs = inventory.pfs().map_err(|e| e.problem())?;
            pfs.into_iter().find(|pf| convert(pf.device.bdf).is_ok_and(|bdf| host_id(bdf) == id))
        }
        Err(_) => match inventory.pf_by_name(name) {
            Ok(pf) => Some(pf),
            Err(sriov::InventoryError::Sysfs(error)) => {
                return Err(Problem::new(ProblemCode::Internal, chain(&error)));
            }
            Err(_) => None,
        },
    };
    found.ok_or_else(|| {
        let pfs = inventory.pfs().unwrap_or_default();
        Problem::not_found(&Missing::among("PF", name, pfs.iter().map(sriov::Pf::name)))
    })
}

fn pf_name(pf: &ObjectRef) -> String {
    match pf {
        ObjectRef::Id(id) => id.to_string(),
        ObjectRef::Name(name) => name.clone(),
    }
}

/// The other users of VFs that no VM has, in words.
fn usages(inventory: &Inventory, taken: &[sriov::Bdf]) -> Result<BTreeMap<sriov::Bdf, String>, Problem> {
    let mut used = BTreeMap::new();
    for pf in inventory.pfs().map_err(|e| e.problem())? {
        for vf in inventory.vfs_of(pf.device.bdf).map_err(|e| e.problem())? {
            let bdf = vf.device.bdf;
            if taken.contains(&bdf) {
                continue;
            }
            // A VF that is removed meanwhile is not in use.
            let usage = inventory.backend(bdf).and_then(|backend| backend.usage(bdf)).ok().flatten();
            used.extend(usage.map(|usage| (bdf, usage.to_string())));
        }
    }
    Ok(used)
}

fn view_vf(
    facts: &Facts,
    pf: &sriov::Pf,
    vf: &sriov::Vf,
    settings: &Result<BTreeMap<u16, VfSettings>, PfError>,
    claims: &[Claim],
) -> Result<Vf, Problem> {
    let bdf = convert(vf.device.bdf)?;
    let settings = settings.as_ref().ok().and_then(|all| all.get(&vf.index));
    Ok(Vf {
        id: host_id(bdf),
        bdf,
        pf: pf.name(),
        index: u32::from(vf.index),
        device: format!("{:04x}:{:04x}", vf.device.vendor, vf.device.device),
        simulated: facts.shown_as_simulated,
        driver: vf.device.driver.clone(),
        iommu_group: vf.device.iommu_group,
        mac: settings.and_then(|settings| settings.mac).map(|mac| mac.to_string()),
        owner: claims.iter().find(|claim| claim.bdf == vf.device.bdf).map(view::owner),
        used_by: None,
    })
}
