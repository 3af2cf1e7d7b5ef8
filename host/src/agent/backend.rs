// SPDX-License-Identifier: Apache-2.0

//! The agent's side of the API's routes.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use api::{
    Answered, Backend, Caller, ConsoleRead, Health, Lease, LeaseTerms, Missing, Progress, TurnedAway, User,
    problem::{Problem, ProblemCode},
    types::{
        DiskSize, EventKind, Name, ObjectKind, ObjectRef, Pf, Subject, Timestamp, UnicastMac, Vf, Vm,
        VmAction, VmSpec, VmStats,
    },
};
use async_trait::async_trait;
use axum::body::Bytes;
use failpoints::{Point, reach};
use protocol::{Outcome, VmmCommand};
use services::{metrics, problem::ToProblem, vmm_process::VmDirectory};
use store::{Entry, StoreError};
use text::chain;
use tokio::{
    sync::{Mutex, MutexGuard},
    task::JoinSet,
    time::{Instant, timeout, timeout_at},
};
use tracing::Instrument as _;
use uuid::Uuid;

use super::{console, strangers::Strangers, view};
use crate::{
    environment::Environment,
    nics,
    vm::{
        VmHandle,
        record::{Asked, Claim, RunRecord, VmRecord, generated_port_mac, ports},
        switch_client,
    },
};

/// The longest time for a vmm to respond to a command that costs it nothing.
const PROMPT: Duration = Duration::from_secs(5);

/// The same for metrics, whose reader waits for all VMs.
const MEASURED: Duration = Duration::from_secs(1);

/// The most bytes that one command types on a console.
const TYPED: usize = 1024;

/// The most draws of a new VM's id, while an address made from it is taken.
const DRAWS: usize = 8;

/// The agent: its VMs, and their shared environment. Clones are the same agent.
#[derive(Clone)]
pub struct Agent {
    pub(super) env: Arc<Environment>,
    /// By id, also of VMs that have just been deleted. Held only for look-ups.
    vms: Arc<Mutex<BTreeMap<Uuid, VmHandle>>>,
    /// Held while a VM is created or edited: names and addresses have one owner.
    writing: Arc<Mutex<()>>,
    /// Lines about refused requests.
    strangers: Arc<Strangers>,
}

impl Agent {
    /// Resumes from the store: finds running VMs again, and completes the work that a former agent left undone.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn start(env: Arc<Environment>) -> Result<Self, StoreError> {
        let all = env.vms.list().await?;
        let ids: BTreeSet<Uuid> = all.iter().map(|entry| entry.id).collect();
        let runs = env.runs.list().await?.into_iter();
        let runs = runs.filter(|run| run.value.process.is_some() || !run.value.state.is_at_rest());
        let (run_dir, known) =
            (env.run_dir.clone(), runs.map(|run| run.id).filter(|vm| ids.contains(vm)).collect());
        // Before any VM's task can start a process.
        drop(tokio::task::spawn_blocking(move || crate::vm::unknown::tell(&run_dir, &known)).await);
        let vms: BTreeMap<Uuid, VmHandle> =
            all.into_iter().map(|entry| (entry.id, VmHandle::find(Arc::clone(&env), entry))).collect();
        let orphans: Vec<Entry<Claim>> =
            env.claims.list().await?.into_iter().filter(|claim| !vms.contains_key(&claim.value.vm)).collect();
        if !orphans.is_empty() {
            // Functions that could not be released are logged, and the next agent tries again.
            drop(crate::vm::claims::give_back(&env, orphans, |_| {}).await);
        }
        Ok(Self { env, vms: Arc::new(Mutex::new(vms)), writing: Arc::default(), strangers: Arc::default() })
    }

    /// Presses the power button of every running VM, and waits at most `patience` for the guests to power off.
    pub async fn power_off_all(&self, patience: Duration) {
        if patience.is_zero() {
            return;
        }
        let deadline = Instant::now() + patience;
        let mut reacting = JoinSet::new();
        for vm in self.all().await {
            reacting.spawn(async move {
                let reacted = async {
                    match vm.act_for(VmAction::Shutdown, own(), Asked::Agent).await {
                        Ok(done) => drop(done.await),
                        // The VM does not run.
                        Err(problem) if problem.code == ProblemCode::WrongState => {}
                        Err(problem) => tracing::warn!(vm = %vm.name(), "{problem}"),
                    }
                };
                if timeout_at(deadline, reacted).await.is_err() {
                    tracing::warn!(vm = %vm.name(), "its guest does not power off");
                }
            });
        }
        while reacting.join_next().await.is_some() {}
    }

    /// Stops every VM, and waits at most `patience` for that. No VM is booted from now on, also not by a request that is under
    /// way.
    pub async fn stop_all(&self, patience: Duration) {
        let mut stopping = JoinSet::new();
        // Stopped VMs, too: their tasks may not have begun a requested boot yet.
        for vm in self.all().await {
            let caller = own();
            stopping.spawn(async move {
                let Ok(done) = vm.act_for(VmAction::Stop, caller, Asked::Agent).await else { return };
                if let Ok(Err(problem)) = done.await {
                    tracing::error!(vm = %vm.name(), "{problem}");
                }
            });
        }
        if timeout(patience, async { while stopping.join_next().await.is_some() {} }).await.is_err() {
            tracing::error!("not all VMs have stopped");
        }
    }

    /// Ends the tasks of all VMs; the VMs run on.
    pub async fn leave(&self) {
        for vm in self.all().await {
            vm.leave().await;
        }
    }

    /// The VMs. The task of a VM deletes it at the end of its lease; this removes it from the map.
    async fn known(&self) -> MutexGuard<'_, BTreeMap<Uuid, VmHandle>> {
        let mut vms = self.vms.lock().await;
        vms.retain(|_, vm| !vm.has_ended());
        vms
    }

    async fn all(&self) -> Vec<VmHandle> {
        let mut all: Vec<VmHandle> = self.known().await.values().cloned().collect();
        all.sort_by_key(VmHandle::name);
        all
    }

    async fn find(&self, vm: &ObjectRef) -> Result<VmHandle, Problem> {
        let vms = self.known().await;
        let found = vms.values().find(|handle| vm.means(handle.id, handle.name().as_str()));
        found.cloned().ok_or_else(|| {
            let names = vms.values().map(|handle| handle.name().to_string());
            Problem::not_found(&Missing::among("VM", vm.text(), names))
        })
    }

    fn directory(&self, vm: &VmHandle) -> VmDirectory {
        VmDirectory::new(&self.env.run_dir, vm.id)
    }

    fn view(&self, vm: &VmHandle) -> Vm {
        let unchecked = |adapter: &str| self.env.policy.switch.unchecked(vm.id.into(), adapter);
        view::vm(vm, &self.directory(vm), &self.env.protections_off(), unchecked)
    }

    pub(super) async fn claims(&self) -> Result<Vec<Claim>, Problem> {
        let claims = self.env.claims.list().await.map_err(|e| e.problem())?;
        Ok(claims.into_iter().map(|entry| entry.value).collect())
    }

    async fn create(
        self,
        caller: Caller,
        spec: VmSpec,
        lease: Option<LeaseTerms>,
        record: impl FnOnce(Timestamp, VmSpec, &Caller) -> VmRecord + Send,
    ) -> Result<Vm, Problem> {
        let _writing = self.writing.lock().await;
        let taken = self.others(&spec, None).await?;
        let free = |id: &Uuid| {
            let macs: Vec<_> = addresses(*id, &spec).collect();
            let twice = macs.iter().enumerate().any(|(n, mac)| macs.iter().take(n).any(|other| other == mac));
            !twice && !taken.iter().any(|(mac, _)| macs.contains(mac))
        };
        let id = std::iter::repeat_with(Uuid::new_v4).take(DRAWS).find(free).ok_or_else(|| {
            Problem::new(ProblemCode::MacInUse, "No free address was found: give the adapters addresses.")
        })?;
        let name = spec.name.to_string();
        let value = record(Timestamp::now(), spec, &caller);
        reach(Point::CreateBegun);
        // With its mark: without it, the VM of a client that is killed now would stay.
        let (leased, holder) = (lease.is_some(), lease.and_then(|terms| terms.holder));
        let run = RunRecord { leased, holder, ..RunRecord::created(value.created) };
        let revision = self.env.store_vm(id, &name, &value, &run).await.map_err(|e| e.problem())?;
        reach(Point::CreateStored);
        if let Err(problem) = switch_client::attach(&self.env, id, &value.spec).await {
            self.env.forget_vm(id).await.map_err(|e| e.problem())?;
            return Err(problem);
        }
        reach(Point::CreateAttached);
        let object = Subject { kind: ObjectKind::Vm, id, name: name.clone() };
        self.env.tell(EventKind::Created { object, revision, by: Some(caller.to_string()) });
        let (env, entry) = (Arc::clone(&self.env), Entry { id, name, revision, value });
        let handle = match lease {
            Some(terms) => VmHandle::start_leased(env, entry, terms),
            None => VmHandle::start(env, entry),
        };
        tracing::info!(vm = %handle.name(), %id, by = %caller, "created");
        let vm = self.view(&handle);
        self.vms.lock().await.insert(id, handle);
        Ok(vm)
    }

    /// The addresses of all VMs but `own`, with their names. A problem if one of them is in the specification.
    async fn others(&self, spec: &VmSpec, own: Option<Uuid>) -> Result<Vec<(UnicastMac, Name)>, Problem> {
        let mut taken = Vec::new();
        for vm in self.known().await.values().filter(|vm| Some(vm.id) != own) {
            let record = vm.record();
            taken.extend(addresses(vm.id, &record.value.spec).map(|mac| (mac, vm.name())));
        }
        let adapters = spec.ports().filter(|port| !port.is_nic).map(|port| {
            let generated = own.map(|own| generated_port_mac(own, &port));
            (format!("{}.mac", port.field), port.mac.or(generated))
        });
        let nics = spec.nics.iter().enumerate().map(|(n, nic)| {
            (format!("nics[{n}].mac"), nic.mac.or(own.and_then(|own| nics::address(own, nic))))
        });
        for (field, mac) in adapters.chain(nics) {
            let used = |(other, _): &&(_, _)| Some(*other) == mac;
            if let (Some(mac), Some((_, owner))) = (mac, taken.iter().find(used)) {
                let detail = format!("The address {mac} belongs to the VM {owner}: choose another.");
                return Err(Problem {
                    field: Some(field.into()),
                    ..Problem::new(ProblemCode::MacInUse, detail)
                });
            }
        }
        Ok(taken)
    }

    async fn replace(
        self,
        caller: Caller,
        vm: ObjectRef,
        spec: VmSpec,
        expect: Option<u64>,
    ) -> Result<Vm, Problem> {
        let _writing = self.writing.lock().await;
        let handle = self.find(&vm).await?;
        self.others(&spec, Some(handle.id)).await?;
        let name = ObjectRef::Name(spec.name.to_string());
        if self.find(&name).await.is_ok_and(|other| other.id != handle.id) {
            let detail = format!("The name {} belongs to another VM: choose another name.", spec.name);
            return Err(Problem {
                field: Some("name".into()),
                ..Problem::new(ProblemCode::NameTaken, detail)
            });
        }
        let before = handle.record().revision;
        handle.edit(caller.clone(), spec, expect).await?;
        let vm = self.view(&handle);
        if vm.revision != before {
            tracing::info!(vm = %vm.name, id = %vm.id, revision = vm.revision, by = %caller, "changed");
        }
        Ok(vm)
    }

    async fn delete(self, caller: Caller, vm: ObjectRef, expect: Option<u64>) -> Result<(), Problem> {
        let handle = self.find(&vm).await?;
        handle.delete(caller.clone(), expect).await?;
        self.vms.lock().await.remove(&handle.id);
        tracing::info!(vm = %handle.name(), id = %handle.id, by = %caller, "deleted");
        Ok(())
    }
}

/// The data of a VM in the metrics. Without a response of its process, the data that the process counts is absent.
async fn measure(handle: VmHandle) -> metrics::Vm {
    let status = handle.status();
    let process = status.run.process.as_ref().map(|process| process.pid.to_string());
    let stats = match handle.connection() {
        Ok(connection) => connection.command(VmmCommand::Stats, Vec::new(), MEASURED).await.ok(),
        Err(_) => None,
    };
    metrics::Vm {
        name: handle.name().to_string(),
        state: status.run.state,
        resident: process.and_then(|pid| metrics::resident(&pid)),
        stats: match stats {
            Some(Outcome::Stats(stats)) => Some(view::stats(&handle, *stats)),
            _ => None,
        },
    }
}

/// The agent itself, as a caller.
fn own() -> Caller {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    Caller::User(User { uid, gid, pid: None })
}

/// Completes the work even if the client goes away.
async fn finish<T: Send + 'static>(
    work: impl Future<Output = Result<T, Problem>> + Send + 'static,
) -> Result<T, Problem> {
    tokio::spawn(work.in_current_span())
        .await
        .map_err(|error| Problem::new(ProblemCode::Internal, chain(&error)))?
}

#[async_trait]
impl Backend for Agent {
    async fn health(&self) -> Health {
        let mut complaints = Vec::new();
        if let Err(error) = self.env.vms.list().await {
            complaints.push(chain(&error));
        }
        complaints.extend(self.env.probe.complaint().await);
        if !self.env.kvm.exists() {
            let kvm = self.env.kvm.display();
            complaints.push(format!("{kvm} does not exist, so no VM can boot: load kvm_intel or kvm_amd"));
        }
        Health { complaints }
    }

    async fn metrics(&self) -> Result<String, Problem> {
        let all = self.all().await;
        let counted = all.into_iter().map(|vm| tokio::spawn(measure(vm).in_current_span()));
        let mut vms = Vec::new();
        // At once: each may have to be waited for.
        for vm in counted.collect::<Vec<_>>() {
            vms.extend(vm.await.ok());
        }
        let text = self.env.metrics.text(&vms);
        text.map_err(|error| {
            Problem::new(ProblemCode::Internal, format!("Metrics cannot be written: {error}."))
        })
    }

    fn answered(&self, answered: &Answered<'_>) {
        self.env.metrics.answered(answered);
    }

    fn turned_away(&self, away: &TurnedAway) {
        self.env.metrics.turned_away(away);
        self.strangers.say(away);
    }

    async fn create_vm(
        &self,
        caller: Caller,
        mut spec: VmSpec,
        lease: Option<LeaseTerms>,
    ) -> Result<Vm, Problem> {
        spec.unmask(None)?;
        finish(self.clone().create(caller, spec, lease, VmRecord::new)).await
    }

    async fn clone_vm(&self, caller: Caller, source: ObjectRef, name: Name) -> Result<Vm, Problem> {
        let source = self.find(&source).await?.record();
        let spec = source.value.spec.cloned_as(name);
        let copied = move |created, spec, by: &Caller| source.value.copied(created, spec, by);
        finish(self.clone().create(caller, spec, None, copied)).await
    }

    async fn list_vms(&self) -> Result<Vec<Vm>, Problem> {
        Ok(self.all().await.iter().map(|vm| self.view(vm)).collect())
    }

    async fn get_vm(&self, vm: ObjectRef) -> Result<Vm, Problem> {
        let handle = self.find(&vm).await?;
        let of = handle.clone();
        let placement = tokio::task::spawn_blocking(move || view::placement(&of)).await;
        let placement = placement.map_err(|error| Problem::new(ProblemCode::Internal, chain(&error)))?;
        let mut vm = self.view(&handle);
        vm.status.placement = placement;
        Ok(vm)
    }

    async fn put_vm(
        &self,
        caller: Caller,
        vm: ObjectRef,
        spec: VmSpec,
        expect: Option<u64>,
    ) -> Result<Vm, Problem> {
        finish(self.clone().replace(caller, vm, spec, expect)).await
    }

    async fn delete_vm(&self, caller: Caller, vm: ObjectRef, expect: Option<u64>) -> Result<(), Problem> {
        finish(self.clone().delete(caller, vm, expect)).await
    }

    async fn act(
        &self,
        caller: Caller,
        vm: ObjectRef,
        action: VmAction,
        wait: Duration,
    ) -> Result<Progress, Problem> {
        let handle = self.find(&vm).await?;
        tracing::info!(vm = %handle.name(), action = action.as_str(), by = %caller, "asked");
        let done = handle.act(action, caller).await?;
        let complete = match timeout(wait, done).await {
            Ok(Ok(result)) => result.map(|()| true)?,
            // The VM's task has ended: it was deleted meanwhile.
            Ok(Err(_)) => return Err(Problem::not_found(&Missing::new("VM", handle.name()))),
            Err(_) => false,
        };
        Ok(Progress { vm: self.view(&handle), complete })
    }

    async fn lease_vm(&self, caller: Caller, vm: ObjectRef, terms: LeaseTerms) -> Result<Lease, Problem> {
        let vm = self.find(&vm).await?;
        let lease = vm.lease(terms).await?;
        tracing::info!(vm = %vm.name(), by = %caller, "leased");
        Ok(lease)
    }

    async fn end_lease(&self, caller: Caller, vm: ObjectRef) -> Result<(), Problem> {
        let vm = self.find(&vm).await?;
        vm.end_lease().await?;
        tracing::info!(vm = %vm.name(), by = %caller, "lease ended");
        Ok(())
    }

    async fn resize_disk(&self, caller: Caller, vm: ObjectRef, wanted: DiskSize) -> Result<(), Problem> {
        self.find(&vm).await?.resize_disk(caller, wanted).await
    }

    async fn stats(&self, vm: ObjectRef) -> Result<VmStats, Problem> {
        let handle = self.find(&vm).await?;
        let outcome = handle.connection()?.command(VmmCommand::Stats, Vec::new(), PROMPT).await;
        match outcome.map_err(|e| e.problem())? {
            Outcome::Stats(stats) => Ok(view::stats(&handle, *stats)),
            _ => Err(Problem::new(
                ProblemCode::VmmFailed,
                "The VM's process sent a wrong response to the request for counters.",
            )),
        }
    }

    async fn read_console(
        &self,
        vm: ObjectRef,
        offset: Option<u64>,
        follow: bool,
    ) -> Result<ConsoleRead, Problem> {
        let handle = self.find(&vm).await?;
        let directory = self.directory(&handle);
        console::read(handle, directory, offset, follow).await
    }

    async fn write_console(&self, _caller: Caller, vm: ObjectRef, bytes: Bytes) -> Result<usize, Problem> {
        let connection = self.find(&vm).await?.connection()?;
        let mut total = 0;
        for piece in bytes.chunks(TYPED) {
            let command = VmmCommand::ConsoleInput { bytes: piece.to_vec() };
            match connection.command(command, Vec::new(), PROMPT).await.map_err(|e| e.problem())? {
                Outcome::ConsoleTaken { taken } => {
                    total += taken.min(piece.len());
                    if taken < piece.len() {
                        break;
                    }
                }
                _ => break,
            }
        }
        Ok(total)
    }

    async fn list_pfs(&self) -> Result<Vec<Pf>, Problem> {
        self.show_pfs().await
    }

    async fn get_pf(&self, pf: ObjectRef) -> Result<Pf, Problem> {
        self.show_pf(&pf).await
    }

    async fn set_vfs(
        &self,
        caller: Caller,
        pf: ObjectRef,
        count: u32,
        expect: Option<u64>,
    ) -> Result<Pf, Problem> {
        finish(self.clone().change_vfs(caller, pf, count, expect)).await
    }

    async fn list_vfs(&self) -> Result<Vec<Vf>, Problem> {
        self.show_vfs().await
    }
}

/// The addresses of a VM's adapters and NICs. That of a macvtap is the host's.
fn addresses(vm: Uuid, spec: &VmSpec) -> impl Iterator<Item = UnicastMac> {
    let adapters = ports(vm, spec).filter(|(port, _)| !port.is_nic).map(|(_, mac)| mac);
    adapters.chain(spec.nics.iter().filter_map(move |nic| nics::address(vm, nic)))
}
