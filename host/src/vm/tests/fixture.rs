// SPDX-License-Identifier: Apache-2.0

//! A made-up host for the tests of VMs.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use api::{
    Caller, User,
    problem::ProblemCode,
    types::{Timestamp, VmAction, VmSpec, VmState},
};
use netpolicy::PfCapabilities;
use options::assignable::Assignable;
use protocol::VmmCommand;
use services::{
    decisions::{DecisionLog, KEPT, events::EventHub},
    pf::PfHandle,
    vmm_process::Program,
};
use sriov::{
    Bdf, PfControl, PfError, Sysfs, VfChange, VfSettings,
    fake::{FakePf, FakeSysfs},
};
use store::{Entry, Expect, SqliteStore, Stores};
use switch::{Parts, Policy, SwitchHandle, Timing, VerdictSource};
use tokio::time::timeout;
use uuid::Uuid;

use crate::host_pfs::HostPfs;
use crate::{
    backend::{Hardware, Simulation},
    environment::Environment,
    sim::Simulated,
    vm::{VmHandle, record::VmRecord},
};

pub(crate) const PF: Bdf = Bdf::new(0, 1, 0, 0).unwrap();
pub(crate) const VF0: Bdf = Bdf::new(0, 1, 0x10, 0).unwrap();
pub(crate) const VF1: Bdf = Bdf::new(0, 1, 0x10, 2).unwrap();

/// No step of a test takes longer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Gates at which tests hold the fakes. A gate is closed while its file exists.
#[derive(Clone)]
pub(crate) struct Gates(pub(crate) PathBuf);

impl Gates {
    pub(crate) fn close(&self, gate: &str) {
        std::fs::create_dir_all(&self.0).unwrap();
        std::fs::write(self.0.join(gate), "").unwrap();
    }

    pub(crate) fn open(&self, gate: &str) {
        std::fs::remove_file(self.0.join(gate)).unwrap();
    }

    pub(crate) fn pass(&self, gate: &str) {
        let deadline = Instant::now() + PATIENCE;
        while self.0.join(gate).exists() {
            assert!(Instant::now() < deadline, "{gate} stays closed");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// One PF that many handles configure, like a PF of the kernel.
struct SharedPf(Arc<Mutex<FakePf>>, Gates);

impl PfControl for SharedPf {
    fn name(&self) -> &'static str {
        "eth0"
    }

    fn capabilities(&mut self) -> Result<PfCapabilities, PfError> {
        self.0.lock().unwrap().capabilities()
    }

    fn read_all(&mut self) -> Result<BTreeMap<u16, VfSettings>, PfError> {
        self.1.pass("read");
        self.0.lock().unwrap().read_all()
    }

    fn set(&mut self, vf: u16, change: VfChange) -> Result<(), PfError> {
        self.1.pass("set");
        self.0.lock().unwrap().set(vf, change)
    }
}

pub(crate) struct Host {
    pub(crate) env: Arc<Environment>,
    pub(crate) sysfs: FakeSysfs,
    pub(crate) pf: Arc<Mutex<FakePf>>,
    fresh: VfSettings,
    dir: tempfile::TempDir,
}

impl Host {
    /// A host with a PF, two VFs bound to igbvf, and a kernel file.
    pub(crate) async fn new() -> Self {
        Self::with_environment(|_| {}).await
    }

    pub(crate) async fn with_environment(change: impl FnOnce(&mut Environment<()>)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir(&path).unwrap();
            path
        };
        let sysfs = FakeSysfs::new(path("sys"));
        sysfs.add_igb(PF, "eth0");
        sysfs.sysfs().set_num_vfs(PF, 2, None).unwrap();
        std::fs::write(path("images").join("kernel"), "not really").unwrap();
        let pf = Arc::new(Mutex::new(FakePf::new("eth0", 2)));
        let fresh = pf.lock().unwrap().read(0).unwrap();
        let env = agent(dir.path(), &sysfs, &pf, change).await;
        Self { env, sysfs, pf, fresh, dir }
    }

    /// A host with simulated adapters beside its own.
    pub(crate) async fn with_simulated(simulated: Arc<Simulated>) -> Self {
        Self::with_environment(|env| env.inventory.add(Simulation::new(simulated))).await
    }

    /// A host as an agent without root sees it.
    pub(crate) async fn with_simulated_only(simulated: Arc<Simulated>) -> Self {
        Self::with_environment(|env| {
            env.inventory.leave_out_backends_of_root();
            env.inventory.add(Simulation::new(simulated));
        })
        .await
    }

    /// A host with functions that VMs may have under `devices`.
    pub(crate) async fn with_assignable(words: &[&str]) -> Self {
        let words: Vec<Assignable> = words.iter().map(|word| word.parse().unwrap()).collect();
        Self::with_environment(|env| env.inventory.set_assignable(words.into())).await
    }

    /// The file of the database.
    pub(crate) fn database(&self) -> PathBuf {
        database(self.dir.path())
    }

    /// The environment of another agent on this host.
    pub(crate) async fn another_agent(&self, change: impl FnOnce(&mut Environment<()>)) -> Arc<Environment> {
        agent(self.dir.path(), &self.sysfs, &self.pf, change).await
    }

    /// Gives the host the environment of a new agent.
    pub(crate) async fn new_agent(&mut self) {
        self.new_agent_with(|_| {}).await;
    }

    pub(crate) async fn new_agent_with(&mut self, change: impl FnOnce(&mut Environment<()>)) {
        self.env = self.another_agent(change).await;
    }

    pub(crate) async fn create(&self, name: &str, change: impl FnOnce(&mut VmSpec)) -> VmHandle {
        let mut spec = spec(name);
        change(&mut spec);
        let (id, value) = (Uuid::new_v4(), VmRecord::new(Timestamp::now(), spec, &caller()));
        let revision = self.env.vms.put(id, name, &value, Expect::Absent).await.unwrap();
        VmHandle::start(Arc::clone(&self.env), Entry { id, name: name.into(), revision, value })
    }

    pub(crate) async fn load(&self, id: Uuid) -> VmHandle {
        VmHandle::find(Arc::clone(&self.env), self.env.vms.get(id).await.unwrap())
    }

    /// Starts an action and waits for its completion.
    pub(crate) async fn act(&self, vm: &VmHandle, action: VmAction) -> Result<(), ProblemCode> {
        let done = timeout(PATIENCE, vm.act(action, caller())).await.unwrap().map_err(|p| p.code)?;
        timeout(PATIENCE, done).await.unwrap().unwrap().map_err(|p| p.code)
    }

    /// Types a word that the fake vmm obeys.
    pub(crate) async fn tell(&self, vm: &VmHandle, word: &str) {
        let command = VmmCommand::ConsoleInput { bytes: word.into() };
        // A fake that dies of the word does not answer.
        drop(vm.connection().unwrap().command(command, Vec::new(), PATIENCE).await);
    }

    pub(crate) async fn reaches(&self, vm: &VmHandle, state: VmState) {
        let mut status = vm.follow();
        let found = timeout(PATIENCE, status.wait_for(|status| status.run.state == state)).await;
        assert!(found.is_ok(), "{} in place of {state}", vm.state());
    }

    /// Waits for the VM to be at rest, after the recovery from a former agent.
    pub(crate) async fn at_rest(&self, vm: &VmHandle) {
        let mut status = vm.follow();
        let rest = status.wait_for(|status| {
            status.run.state.is_at_rest()
                && status.run.state != VmState::Defined
                && status.run.cause.is_some()
        });
        let found = timeout(PATIENCE, rest).await.map(drop);
        assert!(found.is_ok(), "{} and not at rest", vm.state());
    }

    /// Asserts that the host has no trace of a VM.
    pub(crate) async fn assert_untouched(&self) {
        assert_eq!(self.claims().await, 0);
        for (index, vf) in [(0, VF0), (1, VF1)] {
            assert_eq!(self.driver(vf), Some("igbvf".into()));
            assert_eq!(self.env.inventory.device(vf).unwrap().driver_override, None);
            assert_eq!(self.settings(index), self.fresh);
        }
    }

    pub(crate) async fn claims(&self) -> usize {
        self.env.claims.list().await.unwrap().len()
    }

    pub(crate) fn driver(&self, bdf: Bdf) -> Option<String> {
        self.env.inventory.device(bdf).unwrap().driver
    }

    pub(crate) fn group(&self, bdf: Bdf) -> u32 {
        self.env.inventory.device(bdf).unwrap().iommu_group.unwrap()
    }

    pub(crate) fn settings(&self, vf: u16) -> VfSettings {
        self.pf.lock().unwrap().read(vf).unwrap()
    }

    pub(crate) fn gates(&self) -> Gates {
        gates(self.dir.path())
    }

    /// Makes a disk of 1 MiB. Returns its path.
    pub(crate) fn disk(&self, name: &str) -> String {
        let path = self.dir.path().join(name);
        std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
        path.display().to_string()
    }

    pub(crate) fn set_pf_up(&self, up: bool) {
        self.sysfs.set_interface_up(PF, "eth0", up);
    }

    pub(crate) fn pf_answers(&self, answers: &[Option<i32>]) {
        self.pf.lock().unwrap().answers = answers.to_vec();
    }
}

fn database(dir: &Path) -> PathBuf {
    dir.join("state/portcullis.db")
}

/// The environment of an agent, with its switch.
async fn agent(
    dir: &Path,
    sysfs: &FakeSysfs,
    pf: &Arc<Mutex<FakePf>>,
    change: impl FnOnce(&mut Environment<()>),
) -> Arc<Environment> {
    let mut env = environment(dir, &sysfs.sysfs(), pf);
    change(&mut env);
    let events = EventHub::default();
    let decisions = DecisionLog::open(&database(dir), KEPT, events.clone()).unwrap();
    let parts = Parts {
        metrics: env.metrics.clone(),
        store: Stores::on_one_host(Arc::new(SqliteStore::open(&database(dir)).unwrap())),
        pf: PfHandle::start(HostPfs::new(env.inventory.clone())).unwrap(),
        decisions: decisions.clone(),
        events: events.clone(),
        hints: None,
        timing: Timing { confirm: Duration::from_millis(300), ..Timing::default() },
        verdict_source: VerdictSource::Policy,
    };
    let switch = SwitchHandle::start(parts).await.unwrap();
    Arc::new(env.with_policy(Policy { switch, decisions, events }))
}

fn gates(dir: &Path) -> Gates {
    Gates(dir.join("gates"))
}

fn environment(dir: &Path, sysfs: &Sysfs, pf: &Arc<Mutex<FakePf>>) -> Environment<()> {
    let store = SqliteStore::open(&database(dir)).unwrap();
    let (pf, gates) = (Arc::clone(pf), gates(dir));
    let passed = gates.0.clone();
    let open_pf = move |_| Ok(Box::new(SharedPf(Arc::clone(&pf), gates.clone())) as Box<dyn PfControl>);
    Environment {
        inventory: Hardware::with_control(sysfs.clone(), Arc::new(open_pf)).into(),
        image_dirs: vec![dir.join("images")],
        // A test machine's own limit may be only 8 MiB.
        memlock_slack: 0,
        kvm: "/dev/null".into(),
        program: Program {
            path: std::env::current_exe().unwrap().into(),
            // The last argument is for the fake. No test has its name.
            arguments: vec![
                "--exact".into(),
                "--nocapture".into(),
                super::fake_vmm::NAME.into(),
                passed.into(),
            ],
        },
        ..Environment::new(&Stores::on_one_host(Arc::new(store)), dir.join("run"))
    }
}

pub(crate) fn spec(name: &str) -> VmSpec {
    serde_json::from_value(serde_json::json!({
        "name": name, "memory": "2MiB", "boot": { "kernel": "kernel" }, "adapters": [{ "id": "eth0" }]
    }))
    .unwrap()
}

pub(crate) fn caller() -> Caller {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    Caller::User(User { uid, gid, pid: None })
}
