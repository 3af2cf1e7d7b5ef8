// SPDX-License-Identifier: Apache-2.0

//! A backend in memory: enough of an agent to try every route.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use api::{
    Answered, Backend, Caller, ConsoleRead, Health, Lease, LeaseTerms, Missing, Problem, ProblemCode,
    Progress, TurnedAway, types::*,
};
use async_trait::async_trait;
use axum::body::Bytes;
use tokio::sync::{mpsc, watch};
use uuid::Uuid;

/// The fake's data, and a record of its calls.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) vms: BTreeMap<Name, Vm>,
    pub(crate) vfs: u32,
    pub(crate) pf_revision: u64,
    pub(crate) callers: Vec<Caller>,
    pub(crate) waits: Vec<Duration>,
    pub(crate) typed: Vec<u8>,
    pub(crate) complaints: Vec<String>,
    pub(crate) answered: Vec<String>,
    pub(crate) turned_away: Vec<String>,
    /// The response to every action, if not success.
    pub(crate) refuse: Option<Problem>,
    /// Whether actions go on after the response.
    pub(crate) slow: bool,
    /// Senders of the consoles that clients follow.
    pub(crate) consoles: Vec<mpsc::Sender<Bytes>>,
    /// Leases that clients hold.
    pub(crate) leases: Vec<watch::Sender<()>>,
    /// The terms of the leases, those of creations among them.
    pub(crate) terms: Vec<LeaseTerms>,
}

#[derive(Clone, Default)]
pub(crate) struct Fake(Arc<Mutex<State>>);

pub(crate) const LOG: &[u8] = b"0123456789";
/// The log's first byte that is kept.
pub(crate) const LOG_START: u64 = 4;

impl Fake {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn vm(&self, vm: &ObjectRef) -> Result<Vm, Problem> {
        let found = self.state().vms.values().find(|known| vm.means(known.id, known.name.as_str())).cloned();
        found.ok_or_else(|| Problem::not_found(&Missing::new("VM", vm)))
    }

    fn pf(&self) -> Pf {
        let state = self.state();
        let bdf = "0000:01:00.0".parse().unwrap();
        Pf {
            id: host_id(bdf),
            name: "eth0".into(),
            revision: state.pf_revision,
            created: Timestamp::from_unix_ms(0),
            spec: PfSpec { vfs: state.vfs },
            status: PfStatus {
                bdf,
                driver: Some("igb".into()),
                device: "8086:10c9".into(),
                simulated: false,
                mac: None,
                up: true,
                carrier: None,
                mtu: Some(1500),
                vfs: state.vfs,
                vfs_in_use: 0,
                max_vfs: 7,
            },
        }
    }
}

fn at_revision(expect: Option<u64>, revision: u64) -> Result<(), Problem> {
    match expect {
        Some(expected) if expected != revision => Err(Problem::revision_mismatch(expected, revision)),
        _ => Ok(()),
    }
}

#[async_trait]
impl Backend for Fake {
    async fn health(&self) -> Health {
        Health { complaints: self.state().complaints.clone() }
    }

    async fn metrics(&self) -> Result<String, Problem> {
        Ok("# EOF\n".to_owned())
    }

    fn answered(&self, answered: &Answered<'_>) {
        let Answered { route, method, status, .. } = answered;
        self.state().answered.push(format!("{method} {route} {status}"));
    }

    fn turned_away(&self, away: &TurnedAway) {
        self.state().turned_away.push(format!("{} {}", away.source, away.code));
    }

    async fn resize_disk(&self, _: Caller, vm: ObjectRef, wanted: DiskSize) -> Result<(), Problem> {
        let vm = self.get_vm(vm).await?;
        if vm.spec.disks.iter().all(|disk| disk.id != wanted.disk) {
            return Err(Problem::new(ProblemCode::NotFound, "No such disk."));
        }
        Ok(())
    }

    async fn clone_vm(&self, caller: Caller, source: ObjectRef, name: Name) -> Result<Vm, Problem> {
        let source = self.get_vm(source).await?;
        self.create_vm(caller, source.spec.cloned_as(name), None).await
    }

    async fn create_vm(
        &self,
        caller: Caller,
        spec: VmSpec,
        lease: Option<LeaseTerms>,
    ) -> Result<Vm, Problem> {
        let mut state = self.state();
        state.terms.extend(lease);
        state.callers.push(caller);
        if state.vms.contains_key(&spec.name) {
            return Err(Problem::new(
                ProblemCode::NameTaken,
                format!("There is a VM {} already.", spec.name),
            ));
        }
        let status = VmStatus {
            state: VmState::Defined,
            since: Timestamp::from_unix_ms(0),
            cause: None,
            operation: None,
            pid: None,
            boots: 0,
            restart: None,
            lease: lease.map(|_| VmLease::default()),
            adapters: Vec::new(),
            devices: Vec::new(),
            nics: Vec::new(),
            console: ConsoleStatus { start: LOG_START, end: 10 },
            placement: None,
            sandbox: SandboxStatus::default(),
        };
        let (id, name, created) = (Uuid::new_v4(), spec.name.clone(), Timestamp::from_unix_ms(0));
        let vm = Vm { id, name: name.clone(), revision: 3, created, spec, status };
        state.vms.insert(name, vm.clone());
        Ok(vm)
    }

    async fn list_vms(&self) -> Result<Vec<Vm>, Problem> {
        Ok(self.state().vms.values().cloned().collect())
    }

    async fn get_vm(&self, vm: ObjectRef) -> Result<Vm, Problem> {
        self.vm(&vm)
    }

    async fn put_vm(
        &self,
        caller: Caller,
        vm: ObjectRef,
        spec: VmSpec,
        expect: Option<u64>,
    ) -> Result<Vm, Problem> {
        let old = self.vm(&vm)?;
        at_revision(expect, old.revision)?;
        let mut state = self.state();
        state.callers.push(caller);
        if let Some(problem) = &state.refuse {
            return Err(problem.clone());
        }
        state.vms.remove(&old.name);
        let vm = Vm { name: spec.name.clone(), revision: old.revision + 1, spec, ..old };
        state.vms.insert(vm.name.clone(), vm.clone());
        Ok(vm)
    }

    async fn delete_vm(&self, _: Caller, vm: ObjectRef, expect: Option<u64>) -> Result<(), Problem> {
        let vm = self.vm(&vm)?;
        at_revision(expect, vm.revision)?;
        self.state().vms.remove(&vm.name);
        Ok(())
    }

    async fn act(
        &self,
        _: Caller,
        vm: ObjectRef,
        action: VmAction,
        wait: Duration,
    ) -> Result<Progress, Problem> {
        let mut vm = self.vm(&vm)?;
        let mut state = self.state();
        state.waits.push(wait);
        if let Some(problem) = &state.refuse {
            return Err(problem.clone());
        }
        vm.status.state = match action {
            VmAction::Boot | VmAction::Resume | VmAction::Reboot => VmState::Running,
            VmAction::Pause => VmState::Paused,
            VmAction::Shutdown | VmAction::Stop => VmState::Stopped,
        };
        state.vms.insert(vm.name.clone(), vm.clone());
        Ok(Progress { vm, complete: !state.slow })
    }

    async fn lease_vm(&self, caller: Caller, vm: ObjectRef, terms: LeaseTerms) -> Result<Lease, Problem> {
        self.vm(&vm)?;
        let (holder, mut ended) = watch::channel(());
        let mut state = self.state();
        state.terms.push(terms);
        state.callers.push(caller);
        state.leases.push(holder);
        Ok(Lease::new(async move { while ended.changed().await.is_ok() {} }))
    }

    async fn end_lease(&self, caller: Caller, vm: ObjectRef) -> Result<(), Problem> {
        self.vm(&vm)?;
        let mut state = self.state();
        state.callers.push(caller);
        state.leases.clear();
        Ok(())
    }

    async fn stats(&self, vm: ObjectRef) -> Result<VmStats, Problem> {
        let vm = self.vm(&vm)?;
        if vm.status.state.is_at_rest() {
            return Err(Problem::new(
                ProblemCode::WrongState,
                format!("{} is {}.", vm.name, vm.status.state),
            ));
        }
        Ok(VmStats { memory: vm.spec.memory.bytes(), ..VmStats::default() })
    }

    async fn read_console(
        &self,
        vm: ObjectRef,
        offset: Option<u64>,
        follow: bool,
    ) -> Result<ConsoleRead, Problem> {
        self.vm(&vm)?;
        let start = offset.unwrap_or(0).clamp(LOG_START, 10);
        let (sender, receiver) = mpsc::channel(4);
        let kept = LOG.get(usize::try_from(start).unwrap()..).unwrap();
        sender.try_send(Bytes::from_static(kept)).unwrap();
        if follow {
            self.state().consoles.push(sender);
        }
        Ok(ConsoleRead::from_channel(start, receiver))
    }

    async fn write_console(&self, _: Caller, vm: ObjectRef, bytes: Bytes) -> Result<usize, Problem> {
        self.vm(&vm)?;
        let taken = bytes.len().min(1024);
        self.state().typed.extend_from_slice(&bytes[..taken]);
        Ok(taken)
    }

    async fn list_pfs(&self) -> Result<Vec<Pf>, Problem> {
        Ok(vec![self.pf()])
    }

    async fn get_pf(&self, pf: ObjectRef) -> Result<Pf, Problem> {
        let known = self.pf();
        if pf.means(known.id, &known.name) {
            Ok(known)
        } else {
            Err(Problem::not_found(&Missing::new("PF", &pf)))
        }
    }

    async fn set_vfs(
        &self,
        _: Caller,
        pf: ObjectRef,
        count: u32,
        expect: Option<u64>,
    ) -> Result<Pf, Problem> {
        let known = self.get_pf(pf).await?;
        at_revision(expect, known.revision)?;
        if count > known.status.max_vfs {
            return Err(Problem::new(ProblemCode::TooManyVfs, "eth0 can have 7 VFs."));
        }
        let mut state = self.state();
        (state.vfs, state.pf_revision) = (count, known.revision + 1);
        drop(state);
        Ok(self.pf())
    }

    async fn list_vfs(&self) -> Result<Vec<Vf>, Problem> {
        let vf = |index: u32| {
            let bdf = format!("0000:01:10.{index}").parse().unwrap();
            Vf {
                id: host_id(bdf),
                bdf,
                pf: "eth0".into(),
                index,
                device: "8086:10ca".into(),
                simulated: false,
                driver: None,
                iommu_group: Some(10 + index),
                mac: None,
                owner: None,
                used_by: None,
            }
        };
        Ok((0..self.state().vfs).map(vf).collect())
    }
}
