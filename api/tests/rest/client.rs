// SPDX-License-Identifier: Apache-2.0

//! The typed client against the served API.

use std::time::Duration;

use api::{Client, ClientError, LeaseTerms, ProblemCode, types::*};
use axum::body::Bytes;
use tokio::{sync::oneshot, task::JoinHandle};
use uuid::Uuid;

use crate::{Server, spec};

fn vm_spec() -> VmSpec {
    serde_json::from_value(spec("web1")).unwrap()
}

fn code<T: std::fmt::Debug>(result: Result<T, ClientError>) -> ProblemCode {
    result.unwrap_err().problem().expect("a problem").code
}

#[tokio::test]
async fn every_call_round_trips() {
    let server = Server::start();
    let client = server.client();
    let vm = client.create_vm(&vm_spec()).await.unwrap();
    assert_eq!(vm.spec, vm_spec());
    assert_eq!(client.list_vms().await.unwrap(), std::slice::from_ref(&vm));
    assert_eq!(client.get_vm(&vm.id.to_string()).await.unwrap(), vm);
    for action in VmAction::ALL {
        let progress = client.act("web1", action, Duration::from_secs(7)).await.unwrap();
        assert!(progress.complete, "{action:?}");
    }
    assert_eq!(server.fake.state().waits, [Duration::from_secs(7); 6]);
    server.fake.state().slow = true;
    let progress = client.act("web1", VmAction::Boot, Duration::ZERO).await.unwrap();
    assert_eq!((progress.complete, progress.vm.status.state), (false, VmState::Running));
    let (action, stage, since) =
        (OperationAction::Boot, Stage::BuildingMachine, Timestamp::from_unix_ms(1_000));
    let operation = Some(VmOperation { action, stage, since, step: 6, steps: 7 });
    server.fake.state().vms.values_mut().for_each(|vm| vm.status.operation = operation);
    assert_eq!(client.get_vm("web1").await.unwrap().status.operation, operation);
    assert_eq!(client.stats("web1").await.unwrap().memory, 512 << 20);
    assert_eq!(client.write_console("web1", "hello").await.unwrap(), 5);

    assert_eq!(client.set_vfs("eth0", 3, Some(0)).await.unwrap().spec, PfSpec { vfs: 3 });
    assert_eq!(client.list_pfs().await.unwrap(), [client.get_pf("eth0").await.unwrap()]);
    assert_eq!(client.list_vfs().await.unwrap().len(), 3);
    assert_eq!(client.health().await.unwrap(), Vec::<String>::new());
    server.fake.state().complaints = vec!["no /dev/kvm".into()];
    assert_eq!(client.health().await.unwrap(), ["no /dev/kvm"]);
    client.delete_vm("web1", Some(vm.revision)).await.unwrap();
    assert_eq!(client.list_vms().await.unwrap(), []);
}

#[tokio::test]
async fn problems_arrive_whole() {
    let server = Server::start();
    let client = server.client();
    assert_eq!(code(client.get_vm("a/../../b?c").await), ProblemCode::NotFound);
    client.create_vm(&vm_spec()).await.unwrap();
    assert_eq!(code(client.create_vm(&vm_spec()).await), ProblemCode::NameTaken);
    assert_eq!(code(client.delete_vm("web1", Some(9)).await), ProblemCode::RevisionMismatch);
    assert_eq!(code(client.set_vfs("eth0", 9, None).await), ProblemCode::TooManyVfs);
    let mut wrong = vm_spec();
    wrong.cpus = 0;
    let error = client.create_vm(&wrong).await.unwrap_err();
    let problem = error.problem().unwrap();
    assert_eq!((problem.status, problem.field.as_deref()), (400, Some("cpus")));
    assert!(problem.request_id.is_some());
}

#[tokio::test]
async fn a_console_is_followed_to_its_end() {
    let server = Server::start();
    let client = server.client();
    client.create_vm(&vm_spec()).await.unwrap();
    let mut console = client.read_console("web1", Some(8), true).await.unwrap();
    assert_eq!((console.start, console.chunk().await.unwrap()), (8, Some(Bytes::from("89"))));
    let sender = server.fake.state().consoles.pop().unwrap();
    for text in ["a", "bc"] {
        sender.send(Bytes::from(text)).await.unwrap();
        assert_eq!(console.chunk().await.unwrap(), Some(Bytes::from(text)));
    }
    drop(sender);
    assert_eq!(console.chunk().await.unwrap(), None);
}

#[tokio::test]
async fn a_client_that_goes_away_ends_its_stream() {
    let server = Server::start();
    let client = server.client();
    client.create_vm(&vm_spec()).await.unwrap();
    drop(client.read_console("web1", None, true).await.unwrap());
    let sender = server.fake.state().consoles.pop().unwrap();
    tokio::time::timeout(Duration::from_secs(10), sender.closed()).await.expect("the receiver is dropped");
}

/// A client that is killed sends nothing: the end of its connection alone must end its hold.
#[tokio::test]
async fn a_lease_is_held_until_its_client_drops_it_or_somebody_ends_it() {
    let server = Server::start();
    let client = server.client();
    let holder = Some(Uuid::new_v4());
    let vm = client.create_leased_vm(&vm_spec(), holder).await.unwrap();
    assert_eq!(vm.status.lease, Some(VmLease::default()));
    let patience = Duration::from_secs(10);
    let lease = client.lease_vm("web1", holder).await.unwrap();
    assert_eq!(std::mem::take(&mut server.fake.state().terms), [LeaseTerms { holder }; 2]);
    let holder = server.fake.state().leases.pop().unwrap();
    assert!(!holder.is_closed());
    drop(lease);
    tokio::time::timeout(patience, holder.closed()).await.expect("the agent learns that the client is gone");

    let mut lease = client.lease_vm("web1", None).await.unwrap();
    let short = Duration::from_millis(100);
    assert!(tokio::time::timeout(short, lease.ended()).await.is_err(), "it has no end of its own");
    client.end_lease("web1").await.unwrap();
    tokio::time::timeout(patience, lease.ended()).await.expect("the client hears of the end").unwrap();
    let code = |error: ClientError| error.problem().unwrap().code;
    assert_eq!(client.lease_vm("web9", None).await.map(drop).map_err(code), Err(ProblemCode::NotFound));
    assert_eq!(client.end_lease("web9").await.map_err(code), Err(ProblemCode::NotFound));
}

/// An agent that dies is not the end of a lease: its client must take it again.
#[tokio::test]
async fn a_client_tells_the_end_of_the_agent_from_that_of_its_lease() {
    let (client, served, end, _directory) = served_until_told();
    client.create_vm(&vm_spec()).await.unwrap();
    let mut lease = client.lease_vm("web1", None).await.unwrap();
    end.send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(10), served).await.expect("a lease does not keep it").unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(10), lease.ended()).await.expect("it is noticed");
    assert!(matches!(ended, Err(ClientError::Broken { .. })), "{ended:?}");
}

#[tokio::test]
async fn an_agent_that_is_away_is_named_with_the_cure() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("api.sock");
    let error = Client::new(&socket).list_vms().await.unwrap_err();
    assert!(matches!(error, ClientError::NoAgent { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains(socket.to_str().unwrap()) && text.contains("portcullis serve"), "{text}");

    // A socket file that an agent left behind is the same to the user.
    drop(tokio::net::UnixListener::bind(&socket).unwrap());
    assert!(matches!(Client::new(&socket).list_vms().await, Err(ClientError::NoAgent { .. })));
}

#[tokio::test]
async fn serving_ends_although_a_console_is_followed() {
    let (client, served, end, _directory) = served_until_told();
    client.create_vm(&vm_spec()).await.unwrap();
    let _console = client.read_console("web1", None, true).await.unwrap();
    end.send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(10), served).await.expect("it ends").unwrap();
}

/// An API that is served until it is told to end.
fn served_until_told() -> (Client, JoinHandle<()>, oneshot::Sender<()>, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("api.sock");
    let listener = tokio::net::UnixListener::bind(&socket).unwrap();
    let (end, ended) = oneshot::channel::<()>();
    let router = api::router(std::sync::Arc::new(crate::fake::Fake::default()));
    let until = async move { drop(ended.await) };
    let served = tokio::spawn(api::serve(vec![listener.into()], router, api::Limits::default(), until));
    (Client::new(&socket), served, end, directory)
}
