// SPDX-License-Identifier: Apache-2.0

//! The agent's end of a control connection: a task per connection carries messages between the socket and the handles.
//!
//! The relays' messages and reboots go straight to the [receiver](RelayEvents) of the connection, in the vmm's order: a
//! guest's driver waits for the responses. Reports of the machine go to the VM's task, as [`Event`]s.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    io,
    ops::RangeInclusive,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::{Arc, OnceLock, Weak},
    time::Duration,
};

use async_trait::async_trait;
use netpolicy::{StandingRefusal, clipped};
use passthrough::relay::Notice;
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{mpsc, oneshot, watch},
    time::timeout,
};
use uuid::Uuid;
use vmm::control::{
    Answer, Ask, Channel, ChannelError, Failure, Order, Outcome, Report, SPOKEN, STANDING_SINCE, State,
    ToAgent, ToVmm,
};

use super::{
    async_fd::polled,
    protocol_guard::{Allowance, Conduct, is_nonsense},
};
use crate::text::printable;

/// The longest wait for a vmm's hello, or for room in its socket.
const PATIENCE: Duration = Duration::from_secs(5);

/// Most characters of a vmm's reason to refuse a connection.
const REASON: usize = 200;

/// Most orders under way at once.
const ORDERS_MAX: usize = 64;

/// Most reports and requests that wait to be handled. A vmm with more floods the agent: an honest one keeps 256 reports
/// while no agent is connected, and has one request for each adapter.
const EVENTS_MAX: usize = 1024;

/// The reason why a connection was not made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The socket cannot be connected.
    #[error("Cannot connect to the vmm's control socket")]
    Socket(#[source] io::Error),
    /// The handshake failed: by a violation of the protocol ([`ConnectError::is_nonsense`]), or by the end of the
    /// connection.
    #[error("The vmm's response violates the protocol")]
    Channel(#[source] ChannelError),
    /// The vmm refused the connection.
    #[error("The vmm refused the connection: {0}")]
    Refused(String),
    /// The vmm's first message is not a hello.
    #[error("The vmm's first message is not a handshake")]
    Handshake,
    /// The vmm chose a version that was not offered.
    #[error("The vmm chose protocol version {0}, which the agent did not offer")]
    Version(u32),
    /// The vmm's hello did not arrive in time.
    #[error("The vmm did not answer the handshake within {} s", PATIENCE.as_secs())]
    Timeout,
}

impl ConnectError {
    /// Whether the vmm violated the protocol.
    #[must_use]
    pub fn is_nonsense(&self) -> bool {
        match self {
            Self::Channel(error) => is_nonsense(error),
            Self::Handshake | Self::Version(_) => true,
            Self::Socket(_) | Self::Refused(_) | Self::Timeout => false,
        }
    }
}

/// The reason why an order has no outcome.
#[derive(Clone, Debug, thiserror::Error)]
pub enum OrderError {
    /// The vmm reports a failure.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// The vmm violated the protocol.
    #[error("The vmm violated the protocol: {0}")]
    Nonsense(String),
    /// The connection ended before the answer.
    #[error("The connection to the vmm ended before the response")]
    Lost,
    /// No answer in time.
    #[error("The vmm did not answer within {} s", .0.as_secs())]
    Timeout(Duration),
    /// Too many orders are under way.
    #[error("Too many commands to this VM are under way: try again later")]
    Busy,
    /// The order does not fit into a message.
    #[error("The command to the vmm is too long")]
    TooLong,
}

/// The hello of a vmm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// Protocol version.
    pub version: u32,
    /// The state of its machine.
    pub state: State,
    /// The number of boots of its machine.
    pub boots: u64,
}

/// A report of the machine. The agent acknowledges it by [`Connection::noted`] once it is stored.
#[derive(Debug)]
pub struct Event {
    /// The report's number.
    pub seq: u64,
    /// The report.
    pub report: Report,
    /// For a reboot: completes when the receiver of the relays' messages has noted it. If it fails, the vmm must keep
    /// the report.
    pub rebooted: Option<oneshot::Receiver<()>>,
}

/// A message of a vmm's relays, or about all of them.
#[derive(Debug)]
pub enum RelayEvent {
    /// A request of a guest. [`Connection::answer`] sends the response.
    Ask {
        /// The request's number.
        id: u64,
        /// The request.
        ask: Ask,
    },
    /// An event of a relay.
    Notice {
        /// The adapter.
        adapter: String,
        /// The event.
        notice: Notice,
        /// Lets the vmm forget the event. If it is dropped, the connection ends, and the vmm repeats the event on the
        /// next one.
        done: oneshot::Sender<()>,
    },
    /// The guest reboots.
    Rebooted {
        /// Lets the vmm forget the reboot.
        done: oneshot::Sender<()>,
    },
}

/// Receives the messages of a vmm's relays, in the vmm's order. The adapters are the VM's.
#[async_trait]
pub trait RelayEvents: Send {
    /// Waits for room for one message. A call that is dropped loses nothing.
    async fn ready(&mut self);

    /// Takes one message, after [`ready`](Self::ready).
    fn take(&mut self, event: RelayEvent);
}

enum Request {
    Order { order: Order, fds: Vec<OwnedFd>, reply: oneshot::Sender<Result<Outcome, OrderError>> },
    Noted(u64),
    Attach(Box<dyn RelayEvents>),
}

/// The versions that this agent speaks.
fn offered() -> RangeInclusive<u32> {
    #[cfg(feature = "test-support")]
    if let Some(versions) = std::env::var("PORTCULLIS_PROTOCOL_FOR_TESTS").ok().as_deref().and_then(versions)
    {
        return versions;
    }
    SPOKEN
}

/// `OLDEST-NEWEST`: the versions that an older or newer build would offer.
#[cfg(feature = "test-support")]
fn versions(text: &str) -> Option<RangeInclusive<u32>> {
    let (oldest, newest) = text.split_once('-')?;
    Some(oldest.parse().ok()?..=newest.parse().ok()?)
}

/// The standing denials of a VM's relays, by adapter.
type Standing = BTreeMap<String, Option<StandingRefusal>>;

/// A handle of a connection, which ends with its last handle.
#[derive(Clone, Debug)]
pub struct Connection {
    requests: mpsc::Sender<Request>,
    /// The relays' standing denials. Only the newest value counts, and it is never lost.
    standing: watch::Sender<Standing>,
    /// The connection's task owns the socket, so that the end of the connection closes it even while handles exist.
    channel: Weak<AsyncFd<Channel>>,
    /// The vmm's violation of the protocol, which has ended the connection.
    fault: Arc<OnceLock<String>>,
}

impl Connection {
    /// Connects to the vmm of `vm` that listens at `path` and shakes hands. The `allowance` of its process limits the
    /// messages of the vmm, which may be about these `adapters` only. The receiver ends with the connection. The relays'
    /// messages wait for [`attach`](Self::attach).
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub async fn open(
        path: &Path,
        vm: Uuid,
        adapters: HashSet<String>,
        allowance: &Allowance,
    ) -> Result<(Self, Greeting, mpsc::Receiver<Event>), ConnectError> {
        let channel = Channel::connect(path).map_err(ConnectError::Socket)?;
        let interest = Interest::READABLE | Interest::WRITABLE;
        let channel = polled(channel, interest).map_err(ConnectError::Socket)?;
        let offered = offered();
        let hello = ToVmm::Hello { oldest: *offered.start(), newest: *offered.end(), vm };
        send(&channel, &hello, &[]).await.map_err(ConnectError::Channel)?;
        let answer = timeout(PATIENCE, receive(&channel)).await.map_err(|_| ConnectError::Timeout)?;
        let greeting = match answer.map_err(ConnectError::Channel)?.0 {
            ToAgent::Hello { version, .. } if !offered.contains(&version) => {
                return Err(ConnectError::Version(version));
            }
            ToAgent::Hello { version, state, boots } => Greeting { version, state, boots },
            ToAgent::Refused { reason } => {
                return Err(ConnectError::Refused(printable(&clipped(&reason, REASON))));
            }
            _ => return Err(ConnectError::Handshake),
        };
        let (requests, inbox) = mpsc::channel(ORDERS_MAX);
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        let channel = Arc::new(channel);
        let (standing, refusals) = watch::channel(Standing::new());
        let fault = Arc::new(OnceLock::new());
        let handle =
            Self { requests, standing, channel: Arc::downgrade(&channel), fault: Arc::clone(&fault) };
        let refusals = Refusals::new(refusals, greeting.version);
        let conduct = Conduct::new(allowance.clone(), adapters);
        tokio::spawn(async move {
            let end = serve(&channel, inbox, refusals, events, conduct, &fault).await;
            if let Err(error) = end {
                tracing::info!(%vm, "the control connection ended: {error}");
            }
        });
        Ok((handle, greeting, receiver))
    }

    /// Sends an order, with descriptors beside it, and waits up to `patience` for the outcome.
    ///
    /// # Errors
    /// See [`OrderError`]. After a timeout the order may still be carried out.
    pub async fn order(
        &self,
        order: Order,
        fds: Vec<OwnedFd>,
        patience: Duration,
    ) -> Result<Outcome, OrderError> {
        let (reply, answer) = oneshot::channel();
        let sent = self.requests.try_send(Request::Order { order, fds, reply });
        sent.map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => OrderError::Busy,
            mpsc::error::TrySendError::Closed(_) => OrderError::Lost,
        })?;
        match timeout(patience, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(self.fault().map_or(OrderError::Lost, OrderError::Nonsense)),
            Err(_) => Err(OrderError::Timeout(patience)),
        }
    }

    /// The vmm's violation of the protocol; None if there was none. Such a vmm must not be trusted any more.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        self.fault.get().cloned()
    }

    /// Sets the standing denial of an adapter's relay; None removes it. The vmm receives it before any later order. A
    /// vmm that is too old for standing denials still sends all requests.
    pub fn set_standing_refusal(&self, adapter: &str, refusal: Option<StandingRefusal>) {
        self.standing.send_if_modified(|standing| match standing.get(adapter) {
            Some(old) if *old == refusal => false,
            None if refusal.is_none() => false,
            _ => {
                standing.insert(adapter.to_owned(), refusal);
                true
            }
        });
    }

    /// Sets the receiver of the relays' messages. It gets all of them, from the first of this connection on.
    pub async fn attach(&self, relays: Box<dyn RelayEvents>) {
        drop(self.requests.send(Request::Attach(relays)).await);
    }

    /// Acknowledges the machine's reports up to `seq`. The vmm may forget them.
    pub async fn noted(&self, seq: u64) {
        // If the connection has ended, the vmm reports again on the next one.
        drop(self.requests.send(Request::Noted(seq)).await);
    }

    /// Responds to a request at once, past the connection's task, because a guest's driver waits for the response. It
    /// is lost if the connection has ended, or if the vmm leaves its socket full: the relay then denies the request by
    /// itself.
    pub fn answer(&self, id: u64, answer: Answer) {
        let Some(channel) = self.channel.upgrade() else { return };
        if let Err(error) = channel.get_ref().send(&ToVmm::Answer { id, answer }, &[]) {
            tracing::debug!("a response to a vmm is lost: {error}");
        }
    }
}

/// The standing denials that the vmm should have, and those that it was sent.
struct Refusals {
    wanted: watch::Receiver<Standing>,
    told: Standing,
    /// The vmm's version of the protocol has standing denials.
    understood: bool,
}

impl Refusals {
    fn new(wanted: watch::Receiver<Standing>, version: u32) -> Self {
        Self { wanted, told: Standing::new(), understood: version >= STANDING_SINCE }
    }

    /// Waits for a change; for ever if there can be none.
    async fn changed(&mut self) {
        if !self.understood || self.wanted.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// The messages for the changes since the last call.
    fn news(&mut self) -> Vec<ToVmm> {
        if !self.understood {
            return Vec::new();
        }
        let wanted = self.wanted.borrow_and_update().clone();
        let new = wanted.iter().filter(|(adapter, refusal)| self.told.get(*adapter) != Some(*refusal));
        let news = new
            .map(|(adapter, refusal)| ToVmm::Standing { adapter: adapter.clone(), refusal: refusal.clone() });
        let news = news.collect();
        self.told = wanted;
        news
    }
}

/// The reports that the vmm must keep. It may forget them in their order only.
#[derive(Default)]
struct Unnoted {
    /// Reports of the machine.
    machine: VecDeque<u64>,
    /// Relays' events, with their completions.
    relays: VecDeque<(u64, oneshot::Receiver<()>)>,
    last: u64,
    told: u64,
}

impl Unnoted {
    fn machine(&mut self, seq: u64) {
        self.machine.push_back(seq);
        self.last = seq;
    }

    fn relay(&mut self, seq: u64, done: oneshot::Receiver<()>) {
        self.relays.push_back((seq, done));
        self.last = seq;
    }

    /// The machine's reports up to `seq` are stored.
    fn noted(&mut self, seq: u64) {
        while self.machine.front().is_some_and(|first| *first <= seq) {
            self.machine.pop_front();
        }
    }

    /// Waits until the first event of a relay is done; for ever if there is none. Returns false if its receiver dropped
    /// it: the vmm must keep it.
    async fn relay_done(&mut self) -> bool {
        let done = match self.relays.front_mut() {
            Some((_, done)) => done.await.is_ok(),
            None => return std::future::pending().await,
        };
        if done {
            self.relays.pop_front();
            // One acknowledgement covers the events behind it that are done as well.
            while self.relays.front_mut().is_some_and(|(_, next)| next.try_recv().is_ok()) {
                self.relays.pop_front();
            }
        }
        done
    }

    /// The number up to which the vmm may forget its reports, if that is news.
    fn news(&mut self) -> Option<u64> {
        let kept = [self.machine.front(), self.relays.front().map(|(seq, _)| seq)];
        let upto = kept.into_iter().flatten().map(|seq| seq.saturating_sub(1)).fold(self.last, u64::min);
        (upto > self.told).then(|| {
            self.told = upto;
            upto
        })
    }

    fn len(&self) -> usize {
        self.relays.len()
    }
}

/// Passes on the relays' messages, and keeps them until there is a receiver.
#[derive(Default)]
struct Relays {
    receiver: Option<Box<dyn RelayEvents>>,
    waiting: VecDeque<RelayEvent>,
}

impl Relays {
    /// Passes on the waiting messages, and waits for room for one more. Until then the vmm's messages stay in the
    /// socket; commands to it need no room.
    async fn ready(&mut self) {
        let Some(receiver) = &mut self.receiver else { return };
        receiver.ready().await;
        while let Some(event) = self.waiting.pop_front() {
            receiver.take(event);
            receiver.ready().await;
        }
    }

    /// Passes on the waiting messages after the vmm's last one. Without a receiver, waits for one.
    async fn finish(&mut self, inbox: &mut mpsc::Receiver<Request>) {
        while !self.waiting.is_empty() && self.receiver.is_none() {
            match inbox.recv().await {
                None => return,
                Some(Request::Attach(receiver)) => self.receiver = Some(receiver),
                Some(Request::Noted(_)) => {}
                Some(Request::Order { reply, .. }) => drop(reply.send(Err(OrderError::Lost))),
            }
        }
        if !self.waiting.is_empty() {
            self.ready().await;
        }
    }

    fn pass(&mut self, event: RelayEvent) {
        match &mut self.receiver {
            Some(receiver) => receiver.take(event),
            None => self.waiting.push_back(event),
        }
    }

    /// The number of waiting messages. [`Unnoted`] counts only the events among them.
    fn len(&self) -> usize {
        self.waiting.len()
    }
}

/// Carries messages until the vmm closes the connection or violates the protocol, or the last handle is dropped.
async fn serve(
    channel: &AsyncFd<Channel>,
    mut inbox: mpsc::Receiver<Request>,
    mut refusals: Refusals,
    events: mpsc::Sender<Event>,
    mut conduct: Conduct,
    fault: &OnceLock<String>,
) -> Result<(), ChannelError> {
    // Set before the waiting callers of orders learn of the end.
    let nonsense = |why: String| {
        let _ = fault.set(why);
        ChannelError::Closed
    };
    let mut waiting: HashMap<u64, oneshot::Sender<Result<Outcome, OrderError>>> = HashMap::new();
    let mut last = 0;
    let (mut unnoted, mut relays) = (Unnoted::default(), Relays::default());
    // A vmm that has closed its end may have left messages in the socket: only a failed read ends the connection, not a
    // failed write.
    let sent = |result| match result {
        Err(ChannelError::Closed) => Ok(()),
        result => result,
    };
    loop {
        if let Some(upto) = unnoted.news() {
            sent(send(channel, &ToVmm::Noted { upto }, &[]).await)?;
        }
        tokio::select! {
            () = refusals.changed() => sent(tell(channel, refusals.news()).await)?,
            request = inbox.recv() => match request {
                None => return Ok(()),
                Some(Request::Noted(upto)) => unnoted.noted(upto),
                Some(Request::Attach(receiver)) => relays.receiver = Some(receiver),
                Some(Request::Order { order, fds, reply }) => {
                    waiting.retain(|_, reply| !reply.is_closed());
                    if waiting.len() >= ORDERS_MAX {
                        drop(reply.send(Err(OrderError::Busy)));
                        continue;
                    }
                    last += 1;
                    // A standing denial that was set before an order must arrive before it.
                    sent(tell(channel, refusals.news()).await)?;
                    conduct.ordered(last, &order).map_err(nonsense)?;
                    match send(channel, &ToVmm::Order { id: last, order }, &fds).await {
                        Ok(()) => drop(waiting.insert(last, reply)),
                        Err(ChannelError::TooLong(_)) => {
                            conduct.withdrawn(last);
                            drop(reply.send(Err(OrderError::TooLong)));
                        }
                        Err(ChannelError::Closed) => drop(reply.send(Err(OrderError::Lost))),
                        Err(error) => return Err(error),
                    }
                }
            },
            done = unnoted.relay_done() => if !done {
                return Err(ChannelError::Closed);
            },
            message = async { relays.ready().await; receive(channel).await } => {
                let (message, length) = match message {
                    Err(error) if is_nonsense(&error) => return Err(nonsense(crate::vm::problem::chain(&error))),
                    Err(error) => {
                        relays.finish(&mut inbox).await;
                        return Err(error);
                    }
                    Ok(message) => message,
                };
                conduct.check(&message, length).map_err(nonsense)?;
                let too_many = || nonsense(format!("it sent more than {EVENTS_MAX} messages at once"));
                let event = match message {
                    ToAgent::Done { id, result } => {
                        // If the caller has stopped waiting for the order, its result is dropped.
                        if let Some(reply) = waiting.remove(&id) {
                            drop(reply.send(result.map_err(OrderError::Failed)));
                        }
                        continue;
                    }
                    ToAgent::Ask { id, ask } => {
                        if relays.len() >= EVENTS_MAX {
                            return Err(too_many());
                        }
                        relays.pass(RelayEvent::Ask { id, ask });
                        continue;
                    }
                    ToAgent::Report { seq, report: Report::Relay { adapter, notice } } => {
                        if unnoted.len() >= EVENTS_MAX {
                            return Err(too_many());
                        }
                        let (done, noted) = oneshot::channel();
                        unnoted.relay(seq, noted);
                        relays.pass(RelayEvent::Notice { adapter, notice, done });
                        continue;
                    }
                    ToAgent::Report { seq, report } => {
                        unnoted.machine(seq);
                        let mut rebooted = None;
                        if let Report::State { state: State::Rebooting, .. } = report {
                            let (done, noted) = oneshot::channel();
                            rebooted = Some(noted);
                            relays.pass(RelayEvent::Rebooted { done });
                        }
                        Event { seq, report, rebooted }
                    }
                    ToAgent::Hello { .. } | ToAgent::Refused { .. } => continue,
                };
                // To wait here for a slow reader would block the results of the reader's own orders.
                match events.try_send(event) {
                    Ok(()) => {}
                    Err(mpsc::error::TrySendError::Full(_)) => return Err(too_many()),
                    Err(mpsc::error::TrySendError::Closed(_)) => return Err(ChannelError::Closed),
                }
            }
        }
    }
}

async fn tell(channel: &AsyncFd<Channel>, messages: Vec<ToVmm>) -> Result<(), ChannelError> {
    for message in messages {
        send(channel, &message, &[]).await?;
    }
    Ok(())
}

async fn send(channel: &AsyncFd<Channel>, message: &ToVmm, fds: &[OwnedFd]) -> Result<(), ChannelError> {
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let sent = async {
        loop {
            let mut ready = channel.writable().await?;
            match channel.get_ref().send(message, &fds) {
                Err(ChannelError::WouldBlock) => ready.clear_ready(),
                result => return result,
            }
        }
    };
    timeout(PATIENCE, sent).await.unwrap_or(Err(ChannelError::WouldBlock))
}

/// Receives a message. Returns it with its length in bytes.
async fn receive(channel: &AsyncFd<Channel>) -> Result<(ToAgent, usize), ChannelError> {
    let mut closed = false;
    loop {
        let mut ready = channel.readable().await?;
        match channel.get_ref().receive_alone() {
            Err(ChannelError::WouldBlock) => ready.clear_ready(),
            // If the peer has left messages unread, the kernel reports its end first, and then delivers its last
            // messages (net/unix/af_unix.c, unix_release_sock): only the second report is the end.
            Err(ChannelError::Closed) if !closed => closed = true,
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        thread,
        time::{Duration, Instant},
    };

    use netpolicy::{OnDenied, Reason};
    use vmm::control::Listener;

    use super::*;

    /// A vmm that speaks `version` and does not answer an order. Returns its messages up to and with the first order.
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
                    Ok((order @ ToVmm::Order { .. }, _)) => {
                        heard.push(order);
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
    async fn a_refusal_without_a_question_is_heard_before_a_later_order_by_those_who_understand_it() {
        let refusal =
            StandingRefusal { unless: vec![], reason: Reason::PortBlocked, on_denied: OnDenied::Nack };
        // Repeated, because `select!` takes a random one of the ready branches.
        for version in [STANDING_SINCE - 1].into_iter().chain([STANDING_SINCE; 20]) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("control.sock");
            let vmm = vmm(Listener::bind(&path).unwrap(), version);
            let (connection, ..) =
                Connection::open(&path, Uuid::nil(), HashSet::new(), &Allowance::new(2)).await.unwrap();
            connection.set_standing_refusal("eth1", None);
            connection.set_standing_refusal("eth0", Some(refusal.clone()));
            drop(connection.order(Order::Run, Vec::new(), PATIENCE).await);
            let order = ToVmm::Order { id: 1, order: Order::Run };
            let told = ToVmm::Standing { adapter: "eth0".into(), refusal: Some(refusal.clone()) };
            let expected = if version < STANDING_SINCE { vec![order] } else { vec![told, order] };
            assert_eq!(vmm.join().unwrap(), expected, "version {version}");
        }
    }

    #[tokio::test]
    async fn reports_are_forgotten_in_their_order() {
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
    struct Recorder(mpsc::UnboundedSender<RelayEvent>);

    #[async_trait]
    impl RelayEvents for Recorder {
        async fn ready(&mut self) {}

        fn take(&mut self, event: RelayEvent) {
            drop(self.0.send(event));
        }
    }

    #[tokio::test]
    async fn relays_messages_come_in_the_vmms_order_also_those_before_their_receiver() {
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
            let report = |seq, report| channel.send(&ToAgent::Report { seq, report }, &[]).unwrap();
            let ask = |id| {
                let ask = serde_json::json!({
                    "ask": "mailbox", "adapter": "eth0", "question": { "seq": id, "request": "reset" },
                });
                let ask = serde_json::from_value(ask).unwrap();
                channel.send(&ToAgent::Ask { id, ask }, &[]).unwrap();
            };
            let notice = || Report::Relay { adapter: "eth0".into(), notice: Notice::PfReset };
            ask(1);
            report(1, notice());
            report(2, Report::State { state: State::Rebooting, boots: 1 });
            ask(2);
            report(3, notice());
            channel
        });
        let allowance = Allowance::new(1);
        let adapters = ["eth0".to_owned()].into();
        let (connection, _, mut events) =
            Connection::open(&path, Uuid::nil(), adapters, &allowance).await.unwrap();
        let _open = tokio::task::spawn_blocking(move || vmm.join().unwrap()).await.unwrap();
        let Some(Event { seq: 2, rebooted: Some(rebooted), .. }) = events.recv().await else {
            panic!("no report of the machine")
        };
        let (sender, mut heard) = mpsc::unbounded_channel();
        connection.attach(Box::new(Recorder(sender))).await;
        let mut kinds = Vec::new();
        for _ in 0..5 {
            kinds.push(match heard.recv().await.unwrap() {
                RelayEvent::Ask { id, .. } => id,
                RelayEvent::Notice { .. } => 10,
                RelayEvent::Rebooted { .. } => 20,
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

    fn pf_reset() -> Report {
        Report::Relay { adapter: "eth0".into(), notice: Notice::PfReset }
    }

    /// Wants no message for as long as it lives.
    struct Full;

    #[async_trait]
    impl RelayEvents for Full {
        async fn ready(&mut self) {
            std::future::pending::<()>().await;
        }

        fn take(&mut self, _event: RelayEvent) {
            panic!("there is no room");
        }
    }

    #[tokio::test]
    async fn commands_reach_a_vmm_whose_messages_find_no_room() {
        let (_dir, path, vmm) = greeting(|channel| {
            channel.send(&ToAgent::Report { seq: 1, report: pf_reset() }, &[]).unwrap();
            let deadline = Instant::now() + PATIENCE;
            while Instant::now() < deadline {
                thread::sleep(Duration::from_millis(1));
                if let Ok((ToVmm::Order { order: Order::Pause, .. }, _)) = channel.receive::<ToVmm>() {
                    return;
                }
            }
            panic!("no command came");
        });
        let adapters = ["eth0".to_owned()].into();
        let (connection, ..) =
            Connection::open(&path, Uuid::nil(), adapters, &Allowance::new(1)).await.unwrap();
        connection.attach(Box::new(Full)).await;
        tokio::time::sleep(Duration::from_millis(10)).await;
        let order = tokio::spawn(async move { connection.order(Order::Pause, Vec::new(), PATIENCE).await });
        tokio::task::spawn_blocking(move || vmm.join().unwrap()).await.unwrap();
        order.abort();
    }

    /// Has no use for what it counts, but lets the vmm forget it.
    struct Counter(Arc<std::sync::atomic::AtomicUsize>);

    #[async_trait]
    impl RelayEvents for Counter {
        async fn ready(&mut self) {}

        fn take(&mut self, event: RelayEvent) {
            if let RelayEvent::Notice { done, .. } = event {
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
                    channel.send(&ToAgent::Report { seq, report: pf_reset() }, &[]).unwrap();
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
}
