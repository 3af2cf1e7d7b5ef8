// SPDX-License-Identifier: Apache-2.0

//! The agent's end of a control connection: a task per connection carries messages between the socket and the handles.
//!
//! The relays' messages and reboots go straight to the [receiver](RelayMessages) of the connection, in the vmm's order: a
//! guest's driver waits for the responses. Events of the machine go to the VM's task, as [`MachineEvent`]s.

mod backlog;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
    ops::RangeInclusive,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::{Arc, OnceLock, Weak},
    time::Duration,
};

use async_trait::async_trait;
use netpolicy::{StandingRefusal, clipped};
use passthrough::relay::RelayEvent;
use protocol::{
    AgentRequest, AgentResponse, Channel, ChannelError, Failure, Outcome, SPOKEN, STANDING_SINCE, State,
    ToAgent, ToVmm, VmmCommand, VmmEvent,
};
use text::printable;
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{mpsc, oneshot, watch},
    time::timeout,
};
use uuid::Uuid;

use self::backlog::{Relays, Unnoted};
use super::{
    async_fd::polled,
    protocol_guard::{Allowance, Conduct, is_nonsense},
};

/// The longest wait for a vmm's hello, or for room in its socket.
const PATIENCE: Duration = Duration::from_secs(5);

/// Most characters of a vmm's reason to refuse a connection.
const REASON: usize = 200;

/// Most commands under way at once.
const COMMANDS_MAX: usize = 64;

/// Most events and requests that wait to be handled. A vmm with more floods the agent: an honest one keeps 256 events
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

/// The reason why a command has no outcome.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CommandError {
    /// The vmm reports a failure.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// The vmm violated the protocol.
    #[error("The vmm violated the protocol: {0}")]
    Nonsense(String),
    /// The connection ended before the response.
    #[error("The connection to the vmm ended before the response")]
    Lost,
    /// No response in time.
    #[error("The vmm did not answer within {} s", .0.as_secs())]
    Timeout(Duration),
    /// Too many commands are under way.
    #[error("Too many commands to this VM are under way: try again later")]
    Busy,
    /// The vmm's version of the protocol does not have the command.
    #[error(
        "The process of the VM is of an older version of Portcullis, which cannot do this: stop the VM and boot it again"
    )]
    TooOld,
    /// The command does not fit into a message.
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

/// An event of the machine. The agent acknowledges it by [`Connection::noted`] once it is stored.
#[derive(Debug)]
pub struct MachineEvent {
    /// The event's number.
    pub seq: u64,
    /// The event.
    pub event: VmmEvent,
    /// For a reboot: completes when the receiver of the relays' messages has noted it. If it fails, the vmm must keep
    /// the event.
    pub rebooted: Option<oneshot::Receiver<()>>,
}

/// A message of a vmm's relays, or about all of them.
#[derive(Debug)]
pub enum RelayMessage {
    /// A request of a guest. [`Connection::respond`] sends the response.
    Request {
        /// The request's number.
        id: u64,
        /// The request.
        request: AgentRequest,
    },
    /// An event of a relay.
    Event {
        /// The adapter.
        adapter: String,
        /// The event.
        event: RelayEvent,
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
pub trait RelayMessages: Send {
    /// Waits for room for one message. A call that is dropped loses nothing.
    async fn ready(&mut self);

    /// Takes one message, after [`ready`](Self::ready).
    fn take(&mut self, message: RelayMessage);
}

enum Request {
    Command { command: VmmCommand, fds: Vec<OwnedFd>, reply: oneshot::Sender<Result<Outcome, CommandError>> },
    Noted(u64),
    Attach(Box<dyn RelayMessages>),
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
    /// The version of the protocol.
    version: u32,
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
    ) -> Result<(Self, Greeting, mpsc::Receiver<MachineEvent>), ConnectError> {
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
        let (requests, inbox) = mpsc::channel(COMMANDS_MAX);
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        let channel = Arc::new(channel);
        let (standing, refusals) = watch::channel(Standing::new());
        let fault = Arc::new(OnceLock::new());
        let handle = Self {
            requests,
            standing,
            channel: Arc::downgrade(&channel),
            fault: Arc::clone(&fault),
            version: greeting.version,
        };
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

    /// Sends a command, with descriptors beside it, and waits up to `patience` for the outcome.
    ///
    /// # Errors
    /// See [`CommandError`]. After a timeout the command may still be carried out.
    pub async fn command(
        &self,
        command: VmmCommand,
        fds: Vec<OwnedFd>,
        patience: Duration,
    ) -> Result<Outcome, CommandError> {
        if command.since() > self.version {
            return Err(CommandError::TooOld);
        }
        let (reply, response) = oneshot::channel();
        let sent = self.requests.try_send(Request::Command { command, fds, reply });
        sent.map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => CommandError::Busy,
            mpsc::error::TrySendError::Closed(_) => CommandError::Lost,
        })?;
        match timeout(patience, response).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(self.fault().map_or(CommandError::Lost, CommandError::Nonsense)),
            Err(_) => Err(CommandError::Timeout(patience)),
        }
    }

    /// Sends a command ahead of any later one, without its outcome. A vmm that is too old or busy does not get it.
    pub fn post(&self, command: VmmCommand) {
        if command.since() <= self.version {
            let (reply, _) = oneshot::channel();
            drop(self.requests.try_send(Request::Command { command, fds: Vec::new(), reply }));
        }
    }

    /// The vmm's violation of the protocol; None if there was none. Such a vmm must not be trusted any more.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        self.fault.get().cloned()
    }

    /// Sets the standing denial of an adapter's relay; None removes it. The vmm receives it before any later command. A
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
    pub async fn attach(&self, relays: Box<dyn RelayMessages>) {
        drop(self.requests.send(Request::Attach(relays)).await);
    }

    /// Acknowledges the machine's events up to `seq`. The vmm may forget them.
    pub async fn noted(&self, seq: u64) {
        // If the connection has ended, the vmm reports again on the next one.
        drop(self.requests.send(Request::Noted(seq)).await);
    }

    /// Responds to a request at once, past the connection's task, because a guest's driver waits for the response. It
    /// is lost if the connection has ended, or if the vmm leaves its socket full: the relay then denies the request by
    /// itself.
    pub fn respond(&self, id: u64, response: AgentResponse) {
        let Some(channel) = self.channel.upgrade() else { return };
        if let Err(error) = channel.get_ref().send(&ToVmm::Response { id, response }, &[]) {
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

/// Carries messages until the vmm closes the connection or violates the protocol, or the last handle is dropped.
async fn serve(
    channel: &AsyncFd<Channel>,
    mut inbox: mpsc::Receiver<Request>,
    mut refusals: Refusals,
    events: mpsc::Sender<MachineEvent>,
    mut conduct: Conduct,
    fault: &OnceLock<String>,
) -> Result<(), ChannelError> {
    // Set before the waiting callers of commands learn of the end.
    let nonsense = |why: String| {
        let _ = fault.set(why);
        ChannelError::Closed
    };
    let mut waiting: HashMap<u64, oneshot::Sender<Result<Outcome, CommandError>>> = HashMap::new();
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
                Some(Request::Command { command, fds, reply }) => {
                    waiting.retain(|_, reply| !reply.is_closed());
                    if waiting.len() >= COMMANDS_MAX {
                        drop(reply.send(Err(CommandError::Busy)));
                        continue;
                    }
                    last += 1;
                    // A standing denial that was set before a command must arrive before it.
                    sent(tell(channel, refusals.news()).await)?;
                    conduct.commanded(last, &command).map_err(nonsense)?;
                    match send(channel, &ToVmm::Command { id: last, command }, &fds).await {
                        Ok(()) => drop(waiting.insert(last, reply)),
                        Err(ChannelError::TooLong(_)) => {
                            conduct.withdrawn(last);
                            drop(reply.send(Err(CommandError::TooLong)));
                        }
                        Err(ChannelError::Closed) => drop(reply.send(Err(CommandError::Lost))),
                        Err(error) => return Err(error),
                    }
                }
            },
            done = unnoted.relay_done() => if !done {
                return Err(ChannelError::Closed);
            },
            message = async { relays.ready().await; receive(channel).await } => {
                let (message, length) = match message {
                    Err(error) if is_nonsense(&error) => return Err(nonsense(text::chain(&error))),
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
                        // If the caller has stopped waiting for the command, its result is dropped.
                        if let Some(reply) = waiting.remove(&id) {
                            drop(reply.send(result.map_err(CommandError::Failed)));
                        }
                        continue;
                    }
                    ToAgent::Request { id, request } => {
                        if relays.len() >= EVENTS_MAX {
                            return Err(too_many());
                        }
                        relays.pass(RelayMessage::Request { id, request });
                        continue;
                    }
                    ToAgent::Event { seq, event: VmmEvent::Relay { adapter, event } } => {
                        if unnoted.len() >= EVENTS_MAX {
                            return Err(too_many());
                        }
                        let (done, noted) = oneshot::channel();
                        unnoted.relay(seq, noted);
                        relays.pass(RelayMessage::Event { adapter, event, done });
                        continue;
                    }
                    ToAgent::Event { seq, event } => {
                        unnoted.machine(seq);
                        let mut rebooted = None;
                        if let VmmEvent::State { state: State::Rebooting, .. } = event {
                            let (done, noted) = oneshot::channel();
                            rebooted = Some(noted);
                            relays.pass(RelayMessage::Rebooted { done });
                        }
                        MachineEvent { seq, event, rebooted }
                    }
                    ToAgent::Hello { .. } | ToAgent::Refused { .. } => continue,
                };
                // To wait here for a slow reader would block the results of the reader's own commands.
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
    loop {
        let mut ready = channel.readable().await?;
        match channel.get_ref().receive_alone() {
            Err(ChannelError::WouldBlock) => ready.clear_ready(),
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests;
