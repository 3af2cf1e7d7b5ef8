// SPDX-License-Identifier: Apache-2.0

//! A host with one PF, two VMs on its VFs 1 and 2, and their port group `web` on the default switch.

use std::{
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use api::{
    Caller, PolicyBackend, User,
    problem::Problem,
    types::{DecisionFilter, ObjectRef, PortGroupSpec},
};
use async_trait::async_trait;
use netpolicy::{Change, Decision, MacAddress, Name, Outcome, Request, StandingRefusal, VfRef, VmId, VmRef};
use passthrough::relay::{self, Forwarded, GuestRequest, How, RelayEvent, Verdict};
use protocol::{AgentResponse, VmmCommand};
use services::{
    decisions::{DecisionLog, KEPT, events::EventHub},
    metrics::Metrics,
    pf::{PfHandle, fake::FakePfs},
    vmm_process::CommandError,
};
use sriov::Hint;
use store::{Expect, ObjectStore as _, Operation, SqliteStore, Stores, Table};
use tokio::{sync::mpsc, time::timeout};
use uuid::Uuid;

use crate::{
    Adapter, Intake, Parts, Policy, SwitchError, SwitchHandle, Timing, VerdictSource, Vmm, record::Attachment,
};

/// No step of a test takes longer.
const PATIENCE: Duration = Duration::from_secs(10);

pub(super) const PF: &str = "eth0";

pub(super) const TIMING: Timing = Timing {
    confirm: Duration::from_millis(200),
    deferred: None,
    forwarded: Duration::from_millis(500),
    compare: Duration::from_secs(3600),
    gather: Duration::from_millis(10),
    offer: Duration::from_millis(300),
    #[cfg(feature = "test-support")]
    late: crate::Late { address: Duration::ZERO, multicast: Duration::ZERO },
};

pub(super) fn caller() -> Caller {
    Caller::User(User { uid: 0, gid: 0, pid: None })
}

/// 02:00:00:00:00:NN.
pub(super) fn mac(n: u8) -> MacAddress {
    MacAddress::new([2, 0, 0, 0, 0, n])
}

pub(super) fn vm(n: u8) -> VmId {
    VmId(Uuid::from_u128(n.into()))
}

pub(super) fn vf(n: u8) -> VfRef {
    VfRef { pf: PF.into(), index: n.into() }
}

/// How a vmm carries out commands to revoke changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Revokes {
    #[default]
    Done,
    Deferred,
    Refused,
    /// No response.
    Never,
}

/// A vmm without a process.
pub(super) struct FakeVmm {
    answers: mpsc::UnboundedSender<(u64, Verdict)>,
    heard: Mutex<Heard>,
}

#[derive(Default)]
pub(super) struct Heard {
    pub(super) commands: Vec<VmmCommand>,
    pub(super) stopped: Vec<String>,
    pub(super) revokes: Revokes,
    /// The standing denial.
    pub(super) standing: Option<StandingRefusal>,
}

impl FakeVmm {
    pub(super) fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap()
    }

    /// The commands since the last call.
    pub(super) fn commands(&self) -> Vec<VmmCommand> {
        std::mem::take(&mut self.heard().commands)
    }

    /// The changes that it was commanded to revoke since the last call.
    pub(super) fn revoked(&self) -> Vec<Change> {
        let taken = |command| match command {
            VmmCommand::Revoke { changes, .. } => changes,
            _ => Vec::new(),
        };
        self.commands().into_iter().flat_map(taken).collect()
    }
}

#[async_trait]
impl Vmm for FakeVmm {
    async fn command(
        &self,
        command: VmmCommand,
        patience: Duration,
    ) -> Result<protocol::Outcome, CommandError> {
        self.heard().commands.push(command.clone());
        let revokes = self.heard().revokes;
        let (failed, deferred) = match (revokes, command) {
            (Revokes::Never, VmmCommand::Revoke { .. }) => {
                tokio::time::sleep(patience).await;
                return Err(CommandError::Timeout(patience));
            }
            (Revokes::Refused, VmmCommand::Revoke { changes, .. }) => (changes, false),
            (Revokes::Deferred, VmmCommand::Revoke { .. }) => (Vec::new(), true),
            (Revokes::Done, VmmCommand::Revoke { .. }) => (Vec::new(), false),
            _ => return Ok(protocol::Outcome::Done),
        };
        Ok(protocol::Outcome::Revoked { failed, deferred })
    }

    fn respond(&self, id: u64, response: AgentResponse) {
        let AgentResponse::Mailbox { adapter, verdict } = response;
        assert_eq!(adapter, "eth0");
        drop(self.answers.send((id, verdict)));
    }

    fn set_standing_refusal(&self, adapter: &str, refusal: Option<StandingRefusal>) {
        assert_eq!(adapter, "eth0");
        self.heard().standing = refusal;
    }

    fn close(&self) {}

    fn stop(&self, why: &str) {
        self.heard().stopped.push(why.to_owned());
    }
}

struct Guest {
    vmm: Arc<FakeVmm>,
    answers: mpsc::UnboundedReceiver<(u64, Verdict)>,
    requested: u64,
    intake: Option<Intake>,
}

impl Guest {
    fn new() -> Self {
        let (sender, answers) = mpsc::unbounded_channel();
        Self {
            vmm: Arc::new(FakeVmm { answers: sender, heard: Mutex::default() }),
            answers,
            requested: 0,
            intake: None,
        }
    }
}

pub(super) struct Host {
    pub(super) switch: SwitchHandle,
    pub(super) policy: Policy,
    pub(super) pfs: FakePfs,
    pub(super) metrics: Metrics,
    hints: mpsc::Sender<Hint>,
    guests: Vec<Guest>,
    dir: tempfile::TempDir,
}

async fn parts(
    dir: &Path,
    pfs: &FakePfs,
    metrics: &Metrics,
    timing: Timing,
    verdict_source: VerdictSource,
) -> Result<(SwitchHandle, Policy, mpsc::Sender<Hint>), SwitchError> {
    let path = dir.join("test.db");
    let store = Arc::new(SqliteStore::open(&path).unwrap());
    let events = EventHub::default();
    let decisions = DecisionLog::open(&path, KEPT, events.clone()).unwrap();
    let (hints, hinted) = mpsc::channel(8);
    let parts = Parts {
        metrics: metrics.clone(),
        store: Stores::on_one_host(store),
        pf: PfHandle::start(pfs.clone()).unwrap(),
        decisions: decisions.clone(),
        events: events.clone(),
        hints: Some(hinted),
        timing,
        verdict_source,
    };
    let switch = SwitchHandle::start(parts).await?;
    Ok((switch.clone(), Policy { switch, decisions, events }, hints))
}

impl Host {
    /// Without VMs.
    pub(super) async fn empty() -> Self {
        Self::empty_with(TIMING, VerdictSource::Policy).await
    }

    async fn empty_with(timing: Timing, verdict_source: VerdictSource) -> Self {
        let (dir, pfs) = (tempfile::tempdir().unwrap(), FakePfs::new(&[PF, "eth1"]));
        let metrics = Metrics::default();
        let (switch, policy, hints) =
            parts(dir.path(), &pfs, &metrics, timing, verdict_source).await.unwrap();
        let guests = (0..3).map(|_| Guest::new()).collect();
        Self { switch, policy, pfs, metrics, hints, guests, dir }
    }

    /// With VMs 1 and 2 under these settings.
    pub(super) async fn new(settings: &str) -> Self {
        Self::with_timing(settings, TIMING).await
    }

    /// The same with other times.
    pub(super) async fn with_timing(settings: &str, timing: Timing) -> Self {
        Self::with(settings, timing, VerdictSource::Policy).await
    }

    /// The same with a switch that grants everything.
    pub(super) async fn permissive(settings: &str) -> Self {
        Self::with(settings, TIMING, VerdictSource::Permissive).await
    }

    async fn with(settings: &str, timing: Timing, verdict_source: VerdictSource) -> Self {
        let mut host = Self::empty_with(timing, verdict_source).await;
        host.set(settings).await.unwrap();
        for n in [1, 2] {
            host.power_on(n).await.unwrap();
        }
        host.pfs.take_made(PF);
        host
    }

    /// Ends the agent, and starts another one on the same database.
    pub(super) async fn restart(&mut self) {
        self.restart_after(async |_| {}).await;
    }

    /// Like [`restart`](Self::restart); `meanwhile` sees the store while there is no agent.
    pub(super) async fn restart_after(&mut self, meanwhile: impl AsyncFnOnce(Table<Attachment>)) {
        let store = self.end().await;
        meanwhile(Table::new(&Stores::on_one_host(Arc::new(store)))).await;
        (self.switch, self.policy, self.hints) =
            parts(self.dir.path(), &self.pfs, &self.metrics, TIMING, VerdictSource::Policy).await.unwrap();
    }

    /// The database, beside the agent.
    pub(super) fn database(&self) -> rusqlite::Connection {
        rusqlite::Connection::open(self.dir.path().join("test.db")).unwrap()
    }

    /// The group that the VMs are in.
    pub(super) async fn group(&self) -> api::types::PortGroup {
        self.policy.get_port_group(ObjectRef::Name("web".into())).await.unwrap()
    }

    /// The stored record of a VM's port.
    pub(super) async fn stored(&self, n: u8) -> Attachment {
        let store = Arc::new(SqliteStore::open(&self.dir.path().join("test.db")).unwrap());
        let all = Table::<Attachment>::new(&Stores::on_one_host(store)).list().await.unwrap();
        all.into_iter().map(|entry| entry.value).find(|port| port.vf == Some(vf(n))).expect("it has its VF")
    }

    /// Ends the agent.
    async fn end(&mut self) -> SqliteStore {
        let empty = Self::empty().await;
        // The old task ends with its last handle.
        self.switch = empty.switch;
        self.policy = empty.policy;
        tokio::time::sleep(Duration::from_millis(20)).await;
        SqliteStore::open(&self.dir.path().join("test.db")).unwrap()
    }

    /// Ends the agent, damages all stored objects of one kind, and returns the error of the next
    /// start.
    pub(super) async fn restart_on_damaged(&mut self, kind: &'static str) -> SwitchError {
        let store = self.end().await;
        for object in store.list(kind).await.unwrap().objects {
            let (id, name, value) = (object.id, object.name, serde_json::json!({ "odd": true }));
            let put = Operation::Put { kind, id, name, value, expect: Expect::Any };
            store.commit(vec![put]).await.unwrap();
        }
        parts(self.dir.path(), &self.pfs, &self.metrics, TIMING, VerdictSource::Policy)
            .await
            .err()
            .expect("an error")
    }

    /// As [`restart_on_damaged`](Self::restart_on_damaged), with all objects of one kind lost.
    pub(super) async fn restart_without(&mut self, kind: &'static str) -> SwitchError {
        let store = self.end().await;
        for object in store.list(kind).await.unwrap().objects {
            let delete = Operation::Delete { kind, id: object.id, expect: Expect::Any };
            store.commit(vec![delete]).await.unwrap();
        }
        parts(self.dir.path(), &self.pfs, &self.metrics, TIMING, VerdictSource::Policy)
            .await
            .err()
            .expect("an error")
    }

    /// Sends a hint of a change, and does not wait for its effect.
    pub(super) async fn changed_soon(&self) {
        self.hints.send(Hint::Changed { index: 2, name: Some(PF.into()), up: true }).await.unwrap();
    }

    /// Waits until the relay of VM `n` is commanded to make a change, and asserts that `wait` is over by then.
    pub(super) async fn changed_after(&self, wait: Duration, n: u8, change: &Change) {
        let begun = std::time::Instant::now();
        self.until("a message of the agent's own", async |host| host.vmm(n).revoked().contains(change)).await;
        assert!(begun.elapsed() >= wait, "after {:?}", begun.elapsed());
        self.switch.settle().await;
    }

    /// Creates the group, or replaces its settings.
    pub(super) async fn set(&self, settings: &str) -> Result<(), Problem> {
        let spec = PortGroupSpec {
            switch: "default".parse().unwrap(),
            settings: serde_json::from_str(settings).unwrap(),
            port_overrides: netpolicy::Setting::ALL.iter().copied().collect(),
        };
        self.policy.put_port_group(caller(), "web".parse().unwrap(), spec, None).await.map(drop)
    }

    pub(super) async fn attach(&self, n: u8, group: Option<&str>) -> Result<(), SwitchError> {
        let vm = VmRef { id: vm(n), name: Name::new(format!("vm{n}")).unwrap() };
        let adapter = Adapter { id: "eth0".into(), group: group.map(str::to_owned), mac: mac(n) };
        self.switch.attach(vm, vec![adapter]).await
    }

    pub(super) async fn power_on(&mut self, n: u8) -> Result<(), SwitchError> {
        self.attach(n, Some("web")).await?;
        let changes = self.switch.bind(vm(n), "eth0", vf(n), format!("0000:01:10.{n}")).await?;
        self.switch.program(&vf(n), changes).await?;
        self.connect(n).await;
        Ok(())
    }

    pub(super) async fn connect(&mut self, n: u8) {
        let vmm = Arc::clone(&self.vmm(n));
        let intake = self.switch.connected(vm(n), vmm).await;
        self.guests[usize::from(n)].intake = Some(intake);
    }

    pub(super) fn vmm(&self, n: u8) -> Arc<FakeVmm> {
        Arc::clone(&self.guests[usize::from(n)].vmm)
    }

    /// Sends a request, and does not wait for the response. Returns its number.
    pub(super) async fn send(&mut self, n: u8, request: Request) -> u64 {
        let guest = &mut self.guests[usize::from(n)];
        guest.requested += 1;
        let guest_request = GuestRequest { seq: guest.requested, request };
        let seq = guest_request.seq;
        if let Some(intake) = &mut guest.intake {
            intake.request("eth0".into(), 1000 + seq, guest_request).await;
        }
        seq
    }

    pub(super) async fn answer(&mut self, n: u8) -> Verdict {
        let guest = &mut self.guests[usize::from(n)];
        let (id, verdict) = timeout(PATIENCE, guest.answers.recv()).await.expect("a response").unwrap();
        assert_eq!((id, verdict.seq), (1000 + guest.requested, guest.requested));
        verdict
    }

    pub(super) fn is_answered(&mut self, n: u8) -> bool {
        !self.guests[usize::from(n)].answers.is_empty()
    }

    /// Sends a request as a guest whose PF acknowledges forwarded messages. Returns the final
    /// decision.
    pub(super) async fn request(&mut self, n: u8, request: Request) -> relay::Decision {
        let seq = self.send(n, request).await;
        let verdict = self.answer(n).await;
        if let relay::Decision::Grant { how: How::Forward } = verdict.decision {
            self.event(n, RelayEvent::Forwarded { seq, outcome: Forwarded::Accepted }).await;
        }
        self.switch.settle().await;
        verdict.decision
    }

    pub(super) async fn event(&self, n: u8, event: RelayEvent) {
        let mut intake = self.intake(n);
        timeout(PATIENCE, intake.event("eth0".into(), event)).await.expect("noted");
    }

    /// The way of the messages of a guest's vmm.
    pub(super) fn intake(&self, n: u8) -> Intake {
        self.guests[usize::from(n)].intake.as_ref().expect("connected").again()
    }

    pub(super) async fn hint(&self, hint: Hint) {
        self.hints.send(hint).await.unwrap();
        // The task has taken it when the channel is empty again.
        while self.hints.capacity() < self.hints.max_capacity() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.switch.settle().await;
    }

    pub(super) async fn changed(&self, up: bool) {
        self.hint(Hint::Changed { index: 2, name: Some(PF.into()), up }).await;
    }

    pub(super) async fn port(&self, n: u8) -> api::types::Port {
        self.policy.get_port(ObjectRef::Name(format!("vm{n}/eth0"))).await.unwrap()
    }

    /// The effective and the guest address.
    pub(super) async fn addresses(&self, n: u8) -> (MacAddress, MacAddress) {
        let status = self.port(n).await.status;
        (status.effective_mac, status.guest_mac)
    }

    /// The address that the PF has for a VM's VF.
    pub(super) fn pf_mac(&self, n: u8) -> Option<MacAddress> {
        self.pfs.vf(PF, n.into()).mac
    }

    /// All decisions of a VM with these outcomes, the latest first.
    pub(super) async fn decisions(&self, n: u8, outcome: Outcome) -> Vec<Decision> {
        let filter = DecisionFilter {
            vm: Some(format!("vm{n}")),
            verdict: Some(outcome),
            limit: 1000,
            ..DecisionFilter::default()
        };
        self.policy.decisions.query(filter).await.unwrap()
    }

    /// Waits until the condition holds.
    pub(super) async fn until(&self, what: &str, mut so: impl AsyncFnMut(&Self) -> bool) {
        let wait = async {
            while !so(self).await {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("{what}"));
    }
}

pub(super) const LOCAL: relay::Decision = relay::Decision::Grant { how: How::Local };
pub(super) const FORWARD: relay::Decision = relay::Decision::Grant { how: How::Forward };

pub(super) fn refused(tell: netpolicy::OnDenied, reason: netpolicy::Reason) -> relay::Decision {
    relay::Decision::Refuse { tell, reason }
}
