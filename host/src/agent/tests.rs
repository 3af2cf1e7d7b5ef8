// SPDX-License-Identifier: Apache-2.0

//! The agent over its API, on a made-up host with a fake vmm.

use std::{os::unix::fs::PermissionsExt, path::PathBuf, sync::Arc, time::Duration};

use api::{
    Backend, Client, ClientError, Limits,
    problem::ProblemCode,
    types::{EventKind, ObjectKind, VmAction, VmLease, VmState},
};
use sriov::{Bdf, fake::FakePf};
use tokio::sync::oneshot;

use super::*;
use crate::vm::tests::fixture::{Host, PATIENCE, PF, VF0, spec};

struct Served {
    agent: Arc<Agent>,
    client: Client,
    end: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<()>,
}

async fn serve(host: &Host, socket: PathBuf) -> Served {
    let agent = Arc::new(Agent::start(Arc::clone(&host.env)).await.unwrap());
    let listener = listen::unix(&socket, 0o600, None).unwrap();
    let router = api::router(Arc::clone(&agent) as Arc<dyn Backend>);
    let (end, ending) = oneshot::channel::<()>();
    let task = tokio::spawn(api::serve(vec![listener.into()], router, Limits::default(), async move {
        drop(ending.await)
    }));
    Served { agent, client: Client::new(socket), end, task }
}

fn code<T: std::fmt::Debug>(result: Result<T, ClientError>) -> ProblemCode {
    let error = result.unwrap_err();
    let problem = error.problem().expect("a problem of the agent's");
    api::seen::problem(problem);
    problem.code
}

#[tokio::test]
async fn a_vm_s_life_over_the_api() {
    let host = Host::new().await;
    let socket = host.env.run_dir.join("api.sock");
    let served = serve(&host, socket.clone()).await;
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let client = &served.client;

    let vm = client.create_vm(&spec("web1")).await.unwrap();
    assert_eq!((vm.status.state, vm.status.pid), (VmState::Defined, None));
    let mac = vm.status.adapters[0].mac;
    assert_eq!(code(client.create_vm(&spec("web1")).await), ProblemCode::NameTaken);
    let mut other = spec("web2");
    other.adapters[0].mac = Some(mac);
    assert_eq!(code(client.create_vm(&other).await), ProblemCode::MacInUse);
    assert_eq!(code(client.stats("web1").await), ProblemCode::WrongState);

    let progress = client.act("web1", VmAction::Boot, PATIENCE).await.unwrap();
    assert!(progress.complete);
    let adapter = &progress.vm.status.adapters[0];
    assert_eq!(adapter.vf.unwrap().to_string(), VF0.to_string());
    assert_eq!((adapter.vf_index, adapter.pf.as_deref(), adapter.mac), (Some(0), Some("eth0"), mac));
    assert_eq!(client.stats(&vm.id.to_string()).await.unwrap().boots, 1);

    let vfs = client.list_vfs().await.unwrap();
    assert_eq!(vfs[0].owner.as_ref().map(|owner| owner.vm), Some(vm.id));
    assert_eq!((vfs[0].mac.clone(), vfs[0].driver.as_deref()), (Some(mac.to_string()), Some("vfio-pci")));
    assert_eq!(vfs[1].owner, None);
    assert_eq!(code(client.set_vfs("eth0", 0, None).await), ProblemCode::VfsInUse);

    client.act("web1", VmAction::Stop, PATIENCE).await.unwrap();
    assert_eq!(code(client.set_vfs("eth0", 99, None).await), ProblemCode::TooManyVfs);
    let pf = client.get_pf("eth0").await.unwrap();
    assert_eq!(code(client.set_vfs("eth0", 0, Some(pf.revision + 1)).await), ProblemCode::RevisionMismatch);
    assert_eq!(client.set_vfs("eth0", 0, Some(pf.revision)).await.unwrap().status.vfs, 0);
    assert_eq!(code(client.act("web1", VmAction::Boot, PATIENCE).await), ProblemCode::NoFreeVf);

    assert_eq!(code(client.delete_vm("web1", Some(vm.revision + 1)).await), ProblemCode::RevisionMismatch);
    client.delete_vm("web1", Some(vm.revision)).await.unwrap();
    assert_eq!(code(client.get_vm("web1").await), ProblemCode::NotFound);
    served.end.send(()).unwrap();
    served.task.await.unwrap();
}

#[tokio::test]
async fn what_the_hardware_lacks_is_answered_to_who_boots() {
    let cases: [(_, fn(&Host)); 3] = [
        (ProblemCode::VfioUnavailable, |host| host.sysfs.unload_driver("vfio-pci")),
        (ProblemCode::InterruptRemappingOff, |host| host.sysfs.set_interrupt_chip("PCI-MSI")),
        // Sysfs still has the VF.
        (ProblemCode::VfRemoved, |host| *host.pf.lock().unwrap() = FakePf::new("eth0", 0)),
    ];
    for (expect, breaks) in cases {
        let host = Host::new().await;
        let served = serve(&host, host.env.run_dir.join("api.sock")).await;
        let mut spec = spec("web1");
        // Named, because in place of an unnamed VF the agent would look for another one.
        spec.adapters[0].vf = Some(VF0.to_string().parse().unwrap());
        served.client.create_vm(&spec).await.unwrap();
        breaks(&host);
        assert_eq!(code(served.client.act("web1", VmAction::Boot, PATIENCE).await), expect);
    }
}

#[tokio::test]
async fn a_device_that_another_vm_has_is_in_use() {
    let host = Host::with_assignable(&["0000:02:00.0"]).await;
    let device = Bdf::new(0, 2, 0, 0).unwrap();
    host.sysfs.add_device(device, (0x8086, 0x0953), 0x01_08_02, Some(77), None);
    let served = serve(&host, host.env.run_dir.join("api.sock")).await;
    for name in ["first", "second"] {
        let mut spec = spec(name);
        spec.adapters.clear();
        spec.devices = vec![device.to_string().parse().unwrap()];
        served.client.create_vm(&spec).await.unwrap();
    }
    served.client.act("first", VmAction::Boot, PATIENCE).await.unwrap();
    let boot = served.client.act("second", VmAction::Boot, PATIENCE).await;
    assert_eq!(code(boot), ProblemCode::DeviceInUse);
    served.client.act("first", VmAction::Stop, PATIENCE).await.unwrap();

    let host = Host::new().await;
    host.sysfs.add_device(device, (0x8086, 0x0953), 0x01_08_02, Some(77), None);
    let served = serve(&host, host.env.run_dir.join("api.sock")).await;
    let mut spec = spec("first");
    spec.adapters.clear();
    spec.devices = vec![device.to_string().parse().unwrap()];
    served.client.create_vm(&spec).await.unwrap();
    let boot = served.client.act("first", VmAction::Boot, PATIENCE).await;
    assert_eq!(code(boot), ProblemCode::NotAssignable);
}

#[tokio::test]
async fn a_host_that_cannot_be_read_is_an_error_of_its_own() {
    let host = Host::new().await;
    let served = serve(&host, host.env.run_dir.join("api.sock")).await;
    let vendor = host.sysfs.sysfs().device_dir(PF).join("vendor");
    fs::remove_file(&vendor).unwrap();
    fs::create_dir(&vendor).unwrap();
    let error = served.client.list_pfs().await.unwrap_err();
    let problem = error.problem().unwrap();
    api::seen::problem(problem);
    assert_eq!((problem.code, problem.status), (ProblemCode::Internal, 500));
    assert!(problem.detail.contains("vendor"), "{problem}");
}

#[tokio::test]
async fn the_console_can_be_read_followed_and_written() {
    let host = Host::new().await;
    let served = serve(&host, host.env.run_dir.join("api.sock")).await;
    let client = &served.client;
    client.create_vm(&spec("web1")).await.unwrap();
    assert!(client.read_console("web1", None, true).await.unwrap().chunk().await.unwrap().is_none());
    client.act("web1", VmAction::Boot, PATIENCE).await.unwrap();

    let mut follower = client.read_console("web1", None, true).await.unwrap();
    let mut seen = Vec::new();
    for text in ["hello", "world"] {
        let typed = format!("print {text}");
        assert_eq!(client.write_console("web1", typed.clone()).await.unwrap(), typed.len());
        let chunk = tokio::time::timeout(PATIENCE, follower.chunk()).await.unwrap().unwrap().unwrap();
        assert_eq!(chunk, text.as_bytes());
        seen.extend_from_slice(&chunk);
    }
    let mut late = client.read_console("web1", Some(3), false).await.unwrap();
    assert_eq!(late.start, 3);
    assert_eq!(late.chunk().await.unwrap().unwrap(), &seen[3..]);
    assert!(late.chunk().await.unwrap().is_none());
    assert_eq!(client.get_vm("web1").await.unwrap().status.console.end, 10);

    client.act("web1", VmAction::Stop, PATIENCE).await.unwrap();
    let end = tokio::time::timeout(PATIENCE, follower.chunk()).await.unwrap().unwrap();
    assert_eq!(end, None, "the follower's stream ends with the VM");
    let mut log = client.read_console("web1", None, false).await.unwrap();
    assert_eq!(log.chunk().await.unwrap().unwrap(), &seen[..], "the log outlives the process");
}

#[tokio::test]
async fn an_agent_that_ends_leaves_vms_running_or_stops_them_if_told() {
    let mut host = Host::new().await;
    let socket = host.env.run_dir.join("api.sock");
    let served = serve(&host, socket.clone()).await;
    served.client.create_vm(&spec("web1")).await.unwrap();
    served.client.act("web1", VmAction::Boot, PATIENCE).await.unwrap();
    served.end.send(()).unwrap();
    served.task.await.unwrap();
    served.agent.leave().await;
    drop(served.agent);
    assert!(socket.exists(), "a stale socket: the next agent replaces it");

    host.new_agent().await;
    let served = serve(&host, socket).await;
    let found = async {
        while served.client.get_vm("web1").await.unwrap().status.state != VmState::Running {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, found).await.unwrap();
    served.agent.stop_all(PATIENCE).await;
    let vm = served.client.get_vm("web1").await.unwrap();
    assert_eq!(vm.status.state, VmState::Stopped);
    host.assert_untouched().await;
}

/// A call of the API goes on after its client has gone.
#[tokio::test]
async fn an_agent_that_stops_its_vms_leaves_none_that_was_about_to_boot() {
    let host = Host::new().await;
    let served = serve(&host, host.env.run_dir.join("api.sock")).await;
    let agent = &served.agent;
    let vm = served.client.create_vm(&spec("web1")).await.unwrap();
    let mut at_rest = spec("web2");
    at_rest.adapters.clear();
    let at_rest = served.client.create_vm(&at_rest).await.unwrap();
    let by = || api::Caller::Token("a test".into());
    let boot = |vm| agent.act(by(), api::types::ObjectRef::Id(vm), VmAction::Boot, PATIENCE);
    // The command is in the queue of the VM's task, still unread, when the agent looks for running VMs.
    let (booted, ()) = tokio::join!(biased; boot(vm.id), agent.stop_all(PATIENCE));
    assert_eq!(booted.unwrap_err().code, ProblemCode::WrongState);
    assert_eq!(served.client.get_vm("web1").await.unwrap().status.state, VmState::Stopped);
    for vm in [vm.id, at_rest.id] {
        assert_eq!(boot(vm).await.unwrap_err().code, ProblemCode::Unavailable);
    }
    host.assert_untouched().await;
}

#[tokio::test]
async fn what_happens_to_vms_and_pfs_is_told() {
    let host = Host::new().await;
    let served = serve(&host, host.env.run_dir.join("api.sock")).await;
    let mut events = host.env.policy.events.subscribe(None).unwrap();
    let client = &served.client;
    let vm = client.create_vm(&spec("web1")).await.unwrap();
    client.act("web1", VmAction::Boot, PATIENCE).await.unwrap();
    client.write_console("web1", format!("lose {VF0}")).await.unwrap();
    client.write_console("web1", format!("lose {VF0}")).await.unwrap();
    client.act("web1", VmAction::Pause, PATIENCE).await.unwrap();
    client.act("web1", VmAction::Stop, PATIENCE).await.unwrap();
    let pf = client.set_vfs("eth0", 0, None).await.unwrap();
    client.delete_vm("web1", None).await.unwrap();
    assert_eq!(code(client.delete_vm("web1", None).await), ProblemCode::NotFound);
    let mut told = Vec::new();
    while let Ok(event) = events.try_recv() {
        told.push(match event.what {
            EventKind::Created { object, revision, .. } => {
                assert!(object.kind != ObjectKind::Vm || (object.id, revision) == (vm.id, vm.revision));
                format!("created {object}")
            }
            EventKind::Changed { object, revision, .. } => {
                assert!(object.kind != ObjectKind::Pf || (object.id, revision) == (pf.id, pf.revision));
                format!("changed {object}")
            }
            EventKind::Deleted { object, .. } => format!("deleted {object}"),
            EventKind::VmState { vm, state, .. } => format!("{} {state}", vm.name),
            EventKind::Decision { .. } => continue,
            other => panic!("{other:?}"),
        });
    }
    assert_eq!(
        told,
        [
            "created port web1/eth0",
            "created VM web1",
            "web1 starting",
            "web1 running",
            "changed VM web1",
            "web1 paused",
            "web1 stopping",
            "web1 stopped",
            "changed PF eth0",
            "deleted port web1/eth0",
            "deleted VM web1",
        ]
    );
}

/// The VMs of an agent that takes long to start must not end before their clients can come.
#[tokio::test]
async fn the_wait_for_a_client_begins_when_the_agent_listens() {
    let host = Host::with_environment(|env| env.lease_grace = Duration::from_millis(100)).await;
    let served = serve(&host, host.env.run_dir.join("api.sock")).await;
    host.env.serving.send_replace(false);
    served.client.create_leased_vm(&spec("web1"), None).await.unwrap();
    tokio::time::sleep(Duration::from_millis(400)).await;
    served.client.get_vm("web1").await.unwrap();
    host.env.serving.send_replace(true);
    let gone = async {
        while served.client.get_vm("web1").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("it is deleted");
}

/// A leased VM's name and VF are free for the next VM once its client is gone, without a request for that.
#[tokio::test]
async fn a_vm_whose_client_is_gone_is_gone() {
    let host = Host::with_environment(|env| env.lease_grace = Duration::from_millis(300)).await;
    let served = serve(&host, host.env.run_dir.join("api.sock")).await;
    let client = &served.client;
    let gone = async || {
        let gone = async {
            while client.get_vm("web1").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, gone).await.expect("it is deleted");
        assert!(client.list_vms().await.unwrap().is_empty());
    };
    client.create_leased_vm(&spec("web1"), None).await.unwrap();
    let lease = client.lease_vm("web1", None).await.unwrap();
    client.act("web1", VmAction::Boot, PATIENCE).await.unwrap();
    assert_eq!(client.get_vm("web1").await.unwrap().status.lease, Some(VmLease { until: None }));
    drop(lease);
    gone().await;
    host.assert_untouched().await;
    // The client is killed before it takes the lease.
    let vm = client.create_leased_vm(&spec("web1"), None).await.unwrap();
    assert!(host.env.runs.get(vm.id).await.unwrap().value.leased, "the next agent knows it, too");
    gone().await;
    client.create_vm(&spec("web1")).await.unwrap();
    let mut lease = client.lease_vm("web1", None).await.unwrap();
    client.end_lease("web1").await.unwrap();
    lease.ended().await.unwrap();
    assert_eq!(client.get_vm("web1").await.unwrap().status.lease, None);
}

#[test]
fn one_agent_for_a_run_directory_and_one_for_a_socket() {
    let dir = tempfile::tempdir().unwrap();
    let own = || lock(dir.path(), "run directory", "--run-dir", 0o755);
    let first = own().unwrap();
    let error = own().unwrap_err().to_string();
    assert!(error.contains("Another agent") && error.contains("--run-dir"), "{error}");
    drop(first);
    own().unwrap();

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _inside = runtime.enter();
    let socket = dir.path().join("api.sock");
    let living = listen::unix(&socket, 0o600, None).unwrap();
    assert!(listen::unix(&socket, 0o600, None).unwrap_err().to_string().contains("--socket"));
    drop(living);
    assert!(socket.exists());
    listen::unix(&socket, 0o600, None).unwrap();
}

/// A VM without the mark of its lease would outlive its client for ever.
#[tokio::test]
async fn a_vm_and_the_mark_of_its_lease_come_and_go_together() {
    let host = Host::new().await;
    let served = serve(&host, host.env.run_dir.join("api.sock")).await;
    let client = &served.client;
    let database = rusqlite::Connection::open(host.database()).unwrap();
    let fail = |event: &str, row: &str, kind: &str| {
        let when = format!("BEFORE {event} ON objects WHEN {row}.kind = '{kind}'");
        let body = "BEGIN SELECT RAISE(ABORT, 'disk is full'); END";
        database.execute_batch(&format!("CREATE TRIGGER full {when} {body}")).unwrap();
    };
    fail("INSERT", "NEW", "run");
    client.create_leased_vm(&spec("web1"), None).await.unwrap_err();
    assert!(client.list_vms().await.unwrap().is_empty());
    assert_eq!(host.env.vms.list().await.unwrap(), []);
    database.execute_batch("DROP TRIGGER full").unwrap();
    let vm = client.create_leased_vm(&spec("web1"), None).await.unwrap();
    fail("DELETE", "OLD", "vm");
    client.delete_vm("web1", None).await.unwrap_err();
    assert!(host.env.runs.get(vm.id).await.unwrap().value.leased);
    database.execute_batch("DROP TRIGGER full").unwrap();
    client.delete_vm("web1", None).await.unwrap();
    assert_eq!(host.env.runs.list().await.unwrap(), []);
}
