// SPDX-License-Identifier: Apache-2.0

//! Processes of simulated PFs, each of them this test program, and VMs of the fake vmm on them.

use std::{process::ExitCode, sync::Arc, time::Duration};

use api::{
    Backend,
    problem::ProblemCode,
    types::{ObjectRef, VmAction, VmSpec},
};
use netpolicy::{Change, MacAddress, VfRef};
use rustix::process::{Pid, Signal, kill_process};
use services::pf::PfHandle;
use simnic::{MAX_PFS, pf_bdf, vf_bdf};
use sriov::{Bdf, VfChange};
use store::{Entry, SqliteStore};
use switch::Leftover;

use super::*;
use crate::{
    agent::Agent,
    backend::Simulation,
    environment::Environment,
    vm::tests::fixture::{Host, PATIENCE, PF, VF0, caller},
};
use crate::{
    host_pfs::HostPfs,
    vm::scrub::{ScrubVf, clean},
};

/// The test that is the process of a simulated PF.
const PROCESS: &str = "sim::tests::sim_pf_process";

#[test]
fn sim_pf_process() {
    let arguments: Vec<String> = std::env::args().collect();
    let Some(at) = arguments.iter().position(|argument| argument == PROCESS) else { return };
    if let Some(own) = arguments.get(at + 1..).filter(|own| own.len() == 4) {
        let done = process::main(own) == ExitCode::SUCCESS;
        std::process::exit(if done { 0 } else { 1 });
    }
}

fn start(dir: &std::path::Path) -> Start {
    let arguments = ["--exact", "--nocapture", PROCESS].map(Into::into).into();
    let program = Program { path: std::env::current_exe().unwrap().into(), arguments };
    Start { program, ..Start::new(dir, None, Protection::OF_ROOT.into()) }
}

/// A host's store and run directory. Its processes end with it.
struct Sims {
    store: Stores,
    dir: tempfile::TempDir,
    now: Option<Arc<Simulated>>,
}

impl Sims {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&dir.path().join("portcullis.db")).unwrap();
        let store = Stores::on_one_host(Arc::new(store));
        Self { store, dir, now: None }
    }

    /// The adapters of an agent that starts with these options.
    async fn load(&mut self, options: &[&str]) -> Result<Arc<Simulated>, SimError> {
        let options: Vec<SimPfOption> = options.iter().map(|option| option.parse().unwrap()).collect();
        let simulated = Simulated::load(&self.store, &options, start(self.dir.path())).await?;
        simulated.start_all()?;
        self.now = Some(Arc::clone(&simulated));
        Ok(simulated)
    }

    async fn claim(&self, pf: u16) -> Uuid {
        let adapter = crate::vm::record::ClaimedVf {
            id: "eth0".parse().unwrap(),
            pf: pf_bdf(pf).unwrap(),
            pf_name: "whatever".into(),
            index: 0,
            mac: "02:00:00:00:00:01".parse().unwrap(),
        };
        let claim = Claim {
            vm: Uuid::new_v4(),
            vm_name: "web1".into(),
            slot: 0,
            bdf: vf_bdf(pf, 0).unwrap(),
            group: None,
            adapter: Some(adapter),
            before: None,
        };
        let id = Uuid::new_v4();
        let table = Table::<Claim>::new(&self.store);
        table.put(id, &claim.bdf.to_string(), &claim, Expect::Absent).await.unwrap();
        id
    }

    async fn unclaim(&self, claim: Uuid) {
        Table::<Claim>::new(&self.store).remove(claim).await.unwrap();
    }
}

impl Drop for Sims {
    fn drop(&mut self) {
        for adapter in self.now.iter().flat_map(|now| now.all()) {
            adapter.stop();
        }
    }
}

fn pid(simulated: &Simulated, pf: u16) -> u32 {
    simulated.connect(pf_bdf(pf).unwrap()).unwrap().about().pid
}

/// Name, address and number of VFs of each PF.
fn list(simulated: &Simulated) -> Vec<(String, Bdf, u16)> {
    simulated.pfs().iter().map(|pf| (pf.name(), pf.device.bdf, pf.num_vfs)).collect()
}

fn pf(number: u16, name: &str, vfs: u16) -> (String, Bdf, u16) {
    (name.into(), pf_bdf(number).unwrap(), vfs)
}

async fn runs(pid: u32) -> bool {
    for _ in 0..200 {
        if !std::path::Path::new(&format!("/proc/{pid}")).exists() {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    true
}

/// Whether all threads of a process are stopped.
fn is_stopped(process: Pid) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", process.as_raw_nonzero())).unwrap();
    let mut states = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap());
    states.all(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T')))
}

#[tokio::test]
async fn a_pf_keeps_its_process_and_its_address_across_agents() {
    let mut host = Sims::new();
    let first = host.load(&["sim0=2", "sim1=1"]).await.unwrap();
    assert_eq!(list(&first), [pf(0, "sim0", 2), pf(1, "sim1", 1)]);
    let process = pid(&first, 0);
    let mac = Some(MacAddress::new([2, 0, 0, 0, 0, 7]));
    first.open(pf_bdf(0).unwrap()).unwrap().set(1, VfChange::Mac(mac)).unwrap();

    // Neither another order nor a new PF changes an address.
    let second = host.load(&["new=3", "sim1=1", "sim0=2"]).await.unwrap();
    assert_eq!(list(&second), [pf(0, "sim0", 2), pf(1, "sim1", 1), pf(2, "new", 3)]);
    assert_eq!(pid(&second, 0), process, "found, not started anew");
    assert_eq!(second.open(pf_bdf(0).unwrap()).unwrap().read(1).unwrap().mac, mac);
    assert!(host.load(&["a=1", "a=2"]).await.is_err());
}

#[tokio::test]
async fn a_pf_that_was_gone_gets_its_address_again_and_no_other_does() {
    let mut host = Sims::new();
    host.load(&["sima=2"]).await.unwrap();
    let without = host.load(&["simb=2"]).await.unwrap();
    assert_eq!(list(&without), [pf(1, "simb", 2)]);
    let again = host.load(&["simc=1", "sima=1"]).await.unwrap();
    assert_eq!(list(&again), [pf(0, "sima", 1), pf(2, "simc", 1)]);
    again.leave(&[]).await;
    // When every number has had a PF, the lowest number of a PF that is gone is used again.
    let records = Table::<SimPfRecord>::new(&host.store);
    for number in 3..MAX_PFS {
        let record = SimPfRecord { number, vfs: 1, tap: None };
        records.put(id_of(number), &format!("old{number}"), &record, Expect::Any).await.unwrap();
    }
    let full = host.load(&["simc=1", "new=1"]).await.unwrap();
    assert_eq!(list(&full), [pf(0, "new", 1), pf(2, "simc", 1)]);
    full.leave(&[]).await;
}

#[tokio::test]
async fn what_nobody_wants_ends_unless_a_vm_uses_it() {
    let mut host = Sims::new();
    let first = host.load(&["sim0=2", "sim1=1"]).await.unwrap();
    let (used, unused) = (pid(&first, 0), pid(&first, 1));
    let claim = host.claim(0).await;
    // A PF with used VFs stays as it was, whether it is left out or given another number of VFs.
    for options in [&["other=1"][..], &["other=1", "sim0=4"]] {
        let next = host.load(options).await.unwrap();
        assert_eq!(list(&next), [pf(0, "sim0", 2), pf(2, "other", 1)]);
        assert_eq!(pid(&next, 0), used);
        assert!(!runs(unused).await);
    }
    let agent = host.now.clone().unwrap();
    let other = pid(&agent, 2);
    let claims = Table::<Claim>::new(&host.store).list().await.unwrap();
    agent.leave(&claims.into_iter().map(|entry: Entry<Claim>| entry.value).collect::<Vec<_>>()).await;
    assert!(!runs(other).await);
    assert!(agent.open(pf_bdf(2).unwrap()).is_err(), "an agent that leaves starts none again");
    assert_eq!(pid(&agent, 0), used);
    host.unclaim(claim).await;
    let last = host.load(&["sim0=4"]).await.unwrap();
    assert_eq!(list(&last), [pf(0, "sim0", 4)]);
    assert!(!runs(used).await);
    last.leave(&[]).await;
    assert_eq!(std::fs::read_dir(host.dir.path().join("sim")).unwrap().count(), 0, "no leftovers");
}

#[tokio::test]
async fn a_process_that_died_is_started_again_when_it_is_needed() {
    let mut host = Sims::new();
    let simulated = host.load(&["sim0=2"]).await.unwrap();
    let mut control = simulated.open(pf_bdf(0).unwrap()).unwrap();
    assert_eq!(control.read_all().unwrap().len(), 2);
    let first = pid(&simulated, 0);
    kill_process(Pid::from_raw(first.try_into().unwrap()).unwrap(), Signal::KILL).unwrap();
    assert!(!runs(first).await, "and is waited for");
    assert_eq!(control.read_all().unwrap().len(), 2, "the same way leads to the new process");
    simulated.set_vfs(pf_bdf(0).unwrap(), 5).await.unwrap();
    assert_eq!(control.read_all().unwrap().len(), 5);
    assert!(simulated.attach(vf_bdf(0, 5).unwrap()).is_err());
    assert!(simulated.attach(vf_bdf(0, 4).unwrap()).is_ok());
    assert!(simulated.attach(pf_bdf(0).unwrap()).is_err() && simulated.attach(VF0).is_err());
}

#[tokio::test]
async fn an_answer_that_comes_too_late_is_not_taken_for_another() {
    let mut host = Sims::new();
    let simulated = host.load(&["sim0=2"]).await.unwrap();
    let mut control = simulated.open(pf_bdf(0).unwrap()).unwrap();
    let process = Pid::from_raw(pid(&simulated, 0).try_into().unwrap()).unwrap();
    kill_process(process, Signal::STOP).unwrap();
    while !is_stopped(process) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let late = control.set(0, VfChange::Trust(true));
    assert!(matches!(late, Err(PfError::Timeout { .. })), "{late:?}");
    assert!(matches!(simulated.start_all(), Ok(())), "an agent starts all the same");
    kill_process(process, Signal::CONT).unwrap();
    assert_eq!(control.read_all().unwrap()[&0].trust, Some(true));
}

#[tokio::test]
async fn what_a_tenant_left_is_removed_through_the_simulated_mailbox() {
    let mut host = Sims::new();
    let simulated = host.load(&["sim0=1"]).await.unwrap();
    let mac = MacAddress::new([2, 0, 0, 0, 0, 7]);
    simulated.open(pf_bdf(0).unwrap()).unwrap().set(0, VfChange::Mac(Some(mac))).unwrap();
    let mut env = Environment::new(&host.store, host.dir.path().into());
    env.inventory.leave_out_backends_of_root();
    env.inventory.add(Simulation::new(Arc::clone(&simulated)));
    let handle = PfHandle::start(HostPfs::new(env.inventory.clone())).unwrap();
    let leftover = Leftover {
        adapter: "eth0".into(),
        vf: VfRef { pf: "sim0".into(), index: 0 },
        effective_mac: mac,
        changes: vec![Change::Reset, Change::ClearUnicast, Change::SetMulticast(Vec::new())],
    };
    let bdf = vf_bdf(0, 0).unwrap();
    let vf = ScrubVf { backend: Arc::clone(env.inventory.backend(bdf).unwrap()), bdf };
    clean(&handle, vf, &leftover).await.unwrap();
    let counters = simulated.connect(pf_bdf(0).unwrap()).unwrap().counters().unwrap()[&0];
    assert_eq!((counters.messages, counters.refused), (3, 0));
    assert_eq!(handle.read("sim0").await.unwrap()[&0].trust, Some(false), "trusted only meanwhile");
}

#[tokio::test]
async fn a_vm_has_a_simulated_vf_as_it_has_a_real_one() {
    let mut sims = Sims::new();
    let simulated = sims.load(&["sim0=1"]).await.unwrap();
    let host = Host::with_simulated(Arc::clone(&simulated)).await;
    let agent = Agent::start(Arc::clone(&host.env)).await.unwrap();
    let name = |name: &str| ObjectRef::Name(name.into());

    let pfs = agent.list_pfs().await.unwrap();
    let shown: Vec<(&str, bool)> = pfs.iter().map(|pf| (pf.name.as_str(), pf.status.simulated)).collect();
    assert_eq!(shown, [("eth0", false), ("sim0", true)]);
    assert_eq!(pfs[1].status.driver.as_deref(), Some(SIMULATED));

    let wanted = vf_bdf(0, 0).unwrap().to_string();
    let vm = host.create("web1", |spec| spec.adapters[0].vf = Some(wanted.parse().unwrap())).await;
    host.act(&vm, VmAction::Boot).await.unwrap();
    let control = || simulated.open(pf_bdf(0).unwrap()).unwrap().read(0).unwrap();
    let held = vm.status().held;
    assert_eq!((held[0].value.group, held[0].name.as_str()), (None, wanted.as_str()));
    assert_eq!(
        control().mac.map(|mac| mac.bytes()),
        held[0].value.adapter.as_ref().map(|vf| vf.mac.octets())
    );
    let vfs = agent.list_vfs().await.unwrap();
    let vf = vfs.iter().find(|vf| vf.simulated).unwrap();
    assert_eq!(
        (vf.pf.as_str(), vf.iommu_group, vf.owner.as_ref().map(|owner| owner.vm)),
        ("sim0", None, Some(vm.id))
    );

    let refused = agent.set_vfs(caller(), name("sim0"), 3, None).await.unwrap_err();
    assert_eq!(refused.code, ProblemCode::VfsInUse);
    let other = host.create("web2", |spec| spec.adapters[0].vf = Some(wanted.parse().unwrap())).await;
    assert_eq!(host.act(&other, VmAction::Boot).await.unwrap_err(), ProblemCode::VfInUse);

    host.act(&vm, VmAction::Stop).await.unwrap();
    let device = host.create("web3", |spec| spec.devices = vec![wanted.parse().unwrap()]).await;
    assert_eq!(host.act(&device, VmAction::Boot).await.unwrap_err(), ProblemCode::DeviceUnsupported);
    assert_eq!(host.claims().await, 0);
    assert_eq!(control().mac, None, "as it was before");
    for wrong in [0, 65, 100_000] {
        let refused = agent.set_vfs(caller(), name("sim0"), wrong, None).await.unwrap_err();
        assert_eq!(refused.code, ProblemCode::TooManyVfs, "{wrong}");
    }
    let changed = agent.set_vfs(caller(), name("sim0"), 3, None).await.unwrap();
    assert_eq!((changed.spec.vfs, changed.status.vfs, changed.status.max_vfs), (3, 3, 64));
    agent.leave().await;
}

#[tokio::test]
async fn an_agent_without_root_gives_simulated_vfs_only() {
    let mut sims = Sims::new();
    let simulated = sims.load(&["sim0=1"]).await.unwrap();
    let host = Host::with_simulated_only(simulated).await;
    let real = host.create("web1", |spec| spec.adapters[0].vf = Some(VF0.to_string().parse().unwrap())).await;
    assert_eq!(host.act(&real, VmAction::Boot).await.unwrap_err(), ProblemCode::VfioUnavailable);
    let device = host.create("web2", |spec| {
        spec.adapters.clear();
        spec.devices = vec![VF0.to_string().parse().unwrap()];
    });
    assert_eq!(host.act(&device.await, VmAction::Boot).await.unwrap_err(), ProblemCode::VfioUnavailable);
    // Without a named VF, the VM gets a simulated one.
    let any = host.create("web3", |_| {}).await;
    host.act(&any, VmAction::Boot).await.unwrap();
    assert_eq!(any.status().held[0].value.bdf, vf_bdf(0, 0).unwrap());
    let one_more = host.create("web4", |_| {}).await;
    assert_eq!(host.act(&one_more, VmAction::Boot).await.unwrap_err(), ProblemCode::NoFreeVf);
    host.act(&any, VmAction::Stop).await.unwrap();
}

/// The bytes that a process may lock, by proc_pid_limits(5).
fn lockable(pid: i32) -> u64 {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max locked memory")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_vm_locks_memory_for_hardware_only_and_each_failure_names_its_cause() {
    let mut sims = Sims::new();
    let simulated = sims.load(&["sim0=1"]).await.unwrap();
    let host = Host::with_simulated(simulated).await;
    let sim_vf = vf_bdf(0, 0).unwrap();
    for (vf, locked, failure) in [
        (VF0, 2 << 20, "reported an unrecoverable error."),
        (sim_vf, 0, "is gone: the process of its simulated PF has ended. Stop the VM and boot it again."),
    ] {
        let vm =
            host.create("web1", |spec| spec.adapters[0].vf = Some(vf.to_string().parse().unwrap())).await;
        host.act(&vm, VmAction::Boot).await.unwrap();
        assert_eq!(lockable(vm.status().run.process.unwrap().pid), locked, "{vf}");
        host.tell(&vm, &format!("break {vf}")).await;
        let mut status = vm.follow();
        let broken = status.wait_for(|status| !status.run.lost.is_empty());
        let run = tokio::time::timeout(PATIENCE, broken).await.unwrap().unwrap().run.clone();
        assert_eq!(run.lost[&vf.to_string()].detail, format!("Adapter eth0 ({vf}) {failure}"));
        host.act(&vm, VmAction::Stop).await.unwrap();
        vm.delete(caller(), None).await.unwrap();
    }
}

#[tokio::test]
async fn a_vm_with_hardware_needs_the_whole_sandbox() {
    let mut sims = Sims::new();
    let simulated = sims.load(&["sim0=1"]).await.unwrap();
    let host = Host::with_environment(|env| {
        env.sandbox_off = [Protection::Seccomp].into();
        env.inventory.add(Simulation::new(simulated));
    });
    let host = host.await;
    let with = |vf: Bdf| move |spec: &mut VmSpec| spec.adapters[0].vf = Some(vf.to_string().parse().unwrap());
    let real = host.create("web1", with(VF0)).await;
    let problem = real.act(VmAction::Boot, caller()).await.unwrap_err();
    assert_eq!(problem.code, ProblemCode::SandboxUnavailable);
    assert!(problem.detail.contains(&format!("the host's function {VF0}")), "{problem}");
    host.assert_untouched().await;
    let simulated = host.create("web2", with(vf_bdf(0, 0).unwrap())).await;
    host.act(&simulated, VmAction::Boot).await.unwrap();
    host.act(&simulated, VmAction::Stop).await.unwrap();
}

#[tokio::test]
async fn a_simulated_pf_is_no_device_and_knows_its_number_of_vfs() {
    let mut sims = Sims::new();
    let simulated = sims.load(&["sim0=1"]).await.unwrap();
    let host = Host::with_simulated(Arc::clone(&simulated)).await;
    let agent = Agent::start(Arc::clone(&host.env)).await.unwrap();
    let pf = pf_bdf(0).unwrap();
    let device = host.create("web1", |spec| spec.devices = vec![pf.to_string().parse().unwrap()]).await;
    let problem = device.act(VmAction::Boot, caller()).await.unwrap_err();
    assert_eq!(problem.code, ProblemCode::DeviceUnsupported);
    assert!(problem.detail.contains("is simulated"), "{problem}");

    let wanted = async || {
        let pfs = agent.list_pfs().await.unwrap();
        (pfs[0].spec.vfs, pfs[1].spec.vfs)
    };
    assert_eq!(wanted().await, (2, 1));
    // As by another command line, and as by another program of the host.
    simulated.set_vfs(pf, 3).await.unwrap();
    host.sysfs.sysfs().set_num_vfs(PF, 0, None).unwrap();
    assert_eq!(wanted().await, (2, 3));
    agent.leave().await;
}

#[test]
fn a_process_that_is_called_wrongly_says_so() {
    let call = |arguments: &[&str]| {
        let arguments: Vec<String> = arguments.iter().map(ToString::to_string).collect();
        process::main(&arguments)
    };
    for wrong in [&[][..], &["sim0", "many", "-", "-"], &["sim0", "1", "-", "root"], &["sim0", "1", "-"]] {
        assert_eq!(call(wrong), ExitCode::from(2), "{wrong:?}");
    }
}
