// SPDX-License-Identifier: Apache-2.0

use std::{
    thread,
    time::{Duration, Instant},
};

use netpolicy::{OnDenied, Reason};
use protocol::Listener;

use super::{backlog::Unnoted, *};

/// A vmm that speaks `version` and does not answer a command. Returns its messages up to and with the first command.
fn vmm(listener: Listener, version: u32) -> thread::JoinHandle<Vec<ToVmm>> {
    thread::spawn(move || {
        let deadline = Instant::now() + PATIENCE;
        let mut channel = None;
        let mut heard = Vec::new();
        while Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
            let Some(open) = &channel else {
                channel = listener.accept().ok();
                continue;
            };
            match Channel::receive::<ToVmm>(open) {
                Ok((ToVmm::Hello { .. }, _)) => {
                    let hello = ToAgent::Hello { version, state: State::Running, boots: 1 };
                    open.send(&hello, &[]).unwrap();
                }
                Ok((command @ ToVmm::Command { .. }, _)) => {
                    heard.push(command);
                    return heard;
                }
                Ok((message, _)) => heard.push(message),
                Err(ChannelError::WouldBlock) => {}
                Err(error) => panic!("{error}"),
            }
        }
        panic!("no order came: {heard:?}");
    })
}

#[tokio::test]
async fn a_refusal_without_a_request_is_heard_before_a_later_command_by_those_who_understand_it() {
    let refusal = StandingRefusal { unless: vec![], reason: Reason::PortBlocked, on_denied: OnDenied::Nack };
    // Repeated, because `select!` takes a random one of the ready branches.
    for version in [STANDING_SINCE - 1].into_iter().chain([STANDING_SINCE; 20]) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let vmm = vmm(Listener::bind(&path).unwrap(), version);
        let (connection, ..) =
            Connection::open(&path, Uuid::nil(), HashSet::new(), &Allowance::new(2)).await.unwrap();
        connection.set_standing_refusal("eth1", None);
        connection.set_standing_refusal("eth0", Some(refusal.clone()));
        drop(connection.command(VmmCommand::Run, Vec::new(), PATIENCE).await);
        let command = ToVmm::Command { id: 1, command: VmmCommand::Run };
        let told = ToVmm::Standing { adapter: "eth0".into(), refusal: Some(refusal.clone()) };
        let expected = if version < STANDING_SINCE { vec![command] } else { vec![told, command] };
        assert_eq!(vmm.join().unwrap(), expected, "version {version}");
    }
}

#[tokio::test]
async fn events_are_forgotten_in_their_order() {
    let mut unnoted = Unnoted::default();
    let mut events: Vec<_> = [1, 2, 4]
        .into_iter()
        .map(|seq| {
            let (done, noted) = oneshot::channel();
            unnoted.relay(seq, noted);
            Some(done)
        })
        .collect();
    unnoted.machine(5);
    unnoted.machine(6);
    assert_eq!(unnoted.news(), None);
    // The second event is done, and the first is not.
    events[1].take().unwrap().send(()).unwrap();
    let waited = timeout(Duration::from_millis(10), unnoted.relay_done()).await;
    assert!(waited.is_err() && unnoted.news().is_none());
    events[0].take().unwrap().send(()).unwrap();
    assert!(unnoted.relay_done().await);
    assert_eq!(unnoted.news(), Some(3), "the vmm sent no report with this number");
    unnoted.noted(5);
    assert_eq!(unnoted.news(), None);
    // Its receiver has no use for it: the vmm must keep it.
    events[2] = None;
    assert!(!unnoted.relay_done().await && unnoted.news().is_none());
    unnoted.noted(6);
    assert_eq!(unnoted.news(), None);
}

/// Records the messages of relays.
struct Recorder(mpsc::UnboundedSender<RelayMessage>);

#[async_trait]
impl RelayMessages for Recorder {
    async fn ready(&mut self) {}

    fn take(&mut self, message: RelayMessage) {
        drop(self.0.send(message));
    }
}

#[tokio::test]
async fn relays_messages_come_in_the_vmms_order_also_those_before_their_receiver() {
    let (keep, kept) = std::sync::mpsc::channel();
    let (_dir, path, vmm) = greeting(move |channel| {
        let event = |seq, event| channel.send(&ToAgent::Event { seq, event }, &[]).unwrap();
        let request = |id| {
            let request = serde_json::json!({
                "ask": "mailbox", "adapter": "eth0", "question": { "seq": id, "request": "reset" },
            });
            let request = serde_json::from_value(request).unwrap();
            channel.send(&ToAgent::Request { id, request }, &[]).unwrap();
        };
        request(1);
        event(1, pf_reset());
        event(2, VmmEvent::State { state: State::Rebooting, boots: 1 });
        request(2);
        event(3, pf_reset());
        keep.send(channel).unwrap();
    });
    let allowance = Allowance::new(1);
    let adapters = ["eth0".to_owned()].into();
    let (connection, _, mut events) =
        Connection::open(&path, Uuid::nil(), adapters, &allowance).await.unwrap();
    tokio::task::spawn_blocking(move || vmm.join().unwrap()).await.unwrap();
    let _open = kept.recv().unwrap();
    let Some(MachineEvent { seq: 2, rebooted: Some(rebooted), .. }) = events.recv().await else {
        panic!("no report of the machine")
    };
    let (sender, mut heard) = mpsc::unbounded_channel();
    connection.attach(Box::new(Recorder(sender))).await;
    let mut kinds = Vec::new();
    for _ in 0..5 {
        kinds.push(match heard.recv().await.unwrap() {
            RelayMessage::Request { id, .. } => id,
            RelayMessage::Event { .. } => 10,
            RelayMessage::Rebooted { .. } => 20,
        });
    }
    assert_eq!(kinds, [1, 10, 20, 2, 10]);
    assert!(rebooted.await.is_err(), "the recorder has dropped it: the vmm must keep the reboot");
    assert!(events.recv().await.is_none(), "the connection ends, so that the vmm repeats its events");
}

/// A vmm that greets at once, and then does `more`.
fn greeting(
    more: impl FnOnce(Channel) + Send + 'static,
) -> (tempfile::TempDir, std::path::PathBuf, thread::JoinHandle<()>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control.sock");
    let listener = Listener::bind(&path).unwrap();
    let vmm = thread::spawn(move || {
        let channel = loop {
            match listener.accept() {
                Ok(channel) => break channel,
                Err(_) => thread::sleep(Duration::from_millis(1)),
            }
        };
        channel.send(&ToAgent::Hello { version: 1, state: State::Running, boots: 1 }, &[]).unwrap();
        more(channel);
    });
    (dir, path, vmm)
}

fn pf_reset() -> VmmEvent {
    VmmEvent::Relay { adapter: "eth0".into(), event: RelayEvent::PfReset }
}

/// Wants no message for as long as it lives.
struct Full;

#[async_trait]
impl RelayMessages for Full {
    async fn ready(&mut self) {
        std::future::pending::<()>().await;
    }

    fn take(&mut self, _message: RelayMessage) {
        panic!("there is no room");
    }
}

#[tokio::test]
async fn commands_reach_a_vmm_whose_messages_find_no_room() {
    let (_dir, path, vmm) = greeting(|channel| {
        channel.send(&ToAgent::Event { seq: 1, event: pf_reset() }, &[]).unwrap();
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
            if let Ok((ToVmm::Command { command: VmmCommand::Pause, .. }, _)) = channel.receive::<ToVmm>() {
                return;
            }
        }
        panic!("no command came");
    });
    let adapters = ["eth0".to_owned()].into();
    let (connection, ..) = Connection::open(&path, Uuid::nil(), adapters, &Allowance::new(1)).await.unwrap();
    connection.attach(Box::new(Full)).await;
    tokio::time::sleep(Duration::from_millis(10)).await;
    let command =
        tokio::spawn(async move { connection.command(VmmCommand::Pause, Vec::new(), PATIENCE).await });
    tokio::task::spawn_blocking(move || vmm.join().unwrap()).await.unwrap();
    command.abort();
}

/// Has no use for what it counts, but lets the vmm forget it.
struct Counter(Arc<std::sync::atomic::AtomicUsize>);

#[async_trait]
impl RelayMessages for Counter {
    async fn ready(&mut self) {}

    fn take(&mut self, message: RelayMessage) {
        if let RelayMessage::Event { done, .. } = message {
            self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let _ = done.send(());
        }
    }
}

#[tokio::test]
async fn the_last_messages_of_a_vmm_that_is_gone_are_heard() {
    // Repeated, because `select!` takes a random one of the ready branches.
    for round in 0..20 {
        let (_dir, path, vmm) = greeting(move |channel| {
            // Every other one leaves the agent's handshake unread, which the kernel tells the agent first.
            if round % 2 == 0 {
                thread::sleep(Duration::from_millis(20));
            }
            while round % 2 == 1 && channel.receive::<ToVmm>().is_err() {
                thread::sleep(Duration::from_millis(1));
            }
            for seq in 1..=5 {
                channel.send(&ToAgent::Event { seq, event: pf_reset() }, &[]).unwrap();
            }
        });
        let (adapters, allowance) = (["eth0".to_owned()].into(), Allowance::new(1));
        let (connection, _, mut events) =
            Connection::open(&path, Uuid::nil(), adapters, &allowance).await.unwrap();
        tokio::task::spawn_blocking(move || vmm.join().unwrap()).await.unwrap();
        let heard = Arc::default();
        connection.attach(Box::new(Counter(Arc::clone(&heard)))).await;
        assert!(events.recv().await.is_none());
        assert_eq!(heard.load(std::sync::atomic::Ordering::Relaxed), 5);
    }
}
