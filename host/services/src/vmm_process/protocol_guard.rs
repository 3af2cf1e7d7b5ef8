// SPDX-License-Identifier: Apache-2.0

//! The protocol checks of a vmm's connection. The guest may have taken the vmm over, so its messages are hostile input. An
//! honest vmm never violates this protocol.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use passthrough::relay::{Rate, TokenBucket};
use protocol::{AgentRequest, ChannelError, Outcome, ToAgent, VmmCommand, VmmEvent};

/// Longest request or event in bytes. The longest of an honest vmm have about 1 KiB.
const LONGEST: usize = 4096;

/// The length of a response that costs no budget, in bytes. Honest ones have about 100, and failures some more.
const SHORT: usize = 512;

/// Connections to one process at once.
const CONNECTIONS: u32 = 8;

/// Most commands without a response, timed out or not.
const UNANSWERED: usize = 1024;

/// The cost that one vmm process may cause, on all of its connections together: a vmm chooses when a connection ends, and the
/// agent opens another one.
///
/// Each kind of message has a budget of its own, near the highest honest rate of the VM's adapters: a request costs a decision,
/// an event of the machine a durable write, a relay's event a record.
///
/// Shared between the VM's task, which opens connections, and the task of the present connection. There is only one connection
/// at a time, so neither task waits for the lock.
#[derive(Clone, Debug)]
pub struct Allowance(Arc<Mutex<Budgets>>);

#[derive(Debug)]
struct Budgets {
    requests: Budget,
    relay_events: Budget,
    machine_events: Budget,
    connections: Budget,
    /// The bytes of long responses. A process can have the agent repeat some commands as fast as it completes them.
    responses: Budget,
}

impl Allowance {
    /// The allowance of a new process with this number of adapters. A relay takes 50 messages of its guest per second, after 64
    /// at once (`passthrough::relay`). Each can cause a request and an event, or two events: a silent denial, and the new guest
    /// address. A vmm keeps 256 events while no agent is connected. An agent that stalled then receives the content of a whole
    /// socket queue at once.
    #[must_use]
    pub fn new(adapters: usize) -> Self {
        let adapters = u32::try_from(adapters).unwrap_or(u32::MAX).min(16);
        Self(Arc::new(Mutex::new(Budgets {
            requests: Budget::new("requests", 256 + 128 * adapters, 16 + 64 * adapters),
            relay_events: Budget::new("events of relays", 512 + 256 * adapters, 16 + 128 * adapters),
            // A guest resets itself twice per second; each time the machine has two states to report.
            machine_events: Budget::new("reports", 512, 8),
            // A vmm ends a connection only when its agent reads nothing.
            connections: Budget::of(
                "connections",
                Rate { burst: CONNECTIONS, period: Duration::from_secs(10) },
            ),
            // Of an honest process only a revocation that fails has a long response.
            responses: Budget::new("bytes of long responses", 256 << 10, 16 << 10),
        })))
    }

    /// Whether another connection to the process may be opened now. Each costs log lines and work of the switch.
    #[must_use]
    pub fn connect(&self) -> bool {
        self.spend(|budgets| &mut budgets.connections, Instant::now()).is_ok()
    }

    fn spend(&self, of: impl Fn(&mut Budgets) -> &mut Budget, now: Instant) -> Result<(), String> {
        of(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner)).spend(now, 1)
    }

    /// Takes the bytes of a response from their budget.
    fn spend_response(&self, length: usize, now: Instant) -> Result<(), String> {
        if length <= SHORT {
            return Ok(());
        }
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).responses.spend(now, length)
    }
}

/// The state of one connection on which the checks of its next messages depend.
#[derive(Debug)]
pub(super) struct Conduct {
    /// Commands without a response, also those that timed out.
    commands: HashMap<u64, Expected>,
    event: u64,
    request: u64,
    adapters: HashSet<String>,
    allowance: Allowance,
}

/// The messages of one kind that a vmm may send.
#[derive(Debug)]
struct Budget {
    what: &'static str,
    rate: Rate,
    bucket: TokenBucket,
    /// The time of the first message, from which the bucket counts.
    began: Option<Instant>,
}

impl Budget {
    /// This number of messages at once, and this number per second after that.
    fn new(what: &'static str, at_once: u32, per_second: u32) -> Self {
        Self::of(what, Rate { burst: at_once, period: Duration::from_secs(1) / per_second })
    }

    fn of(what: &'static str, rate: Rate) -> Self {
        Self { what, rate, bucket: TokenBucket::new(rate), began: None }
    }

    fn spend(&mut self, now: Instant, tokens: u32) -> Result<(), String> {
        let began = *self.began.get_or_insert(now);
        if self.bucket.take_many(now.saturating_duration_since(began), tokens) {
            return Ok(());
        }
        let Rate { burst, period } = self.rate;
        Err(format!("it sent more than {burst} {} at once, and then one in {period:?}", self.what))
    }
}

/// The responses that a command may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    Done,
    Stats,
    /// At most this number of bytes.
    ConsoleTaken(usize),
    Revoked,
}

impl Conduct {
    /// A new connection to the process of a VM with these adapters.
    pub(super) fn new(allowance: Allowance, adapters: HashSet<String>) -> Self {
        Self { commands: HashMap::new(), event: 0, request: 0, adapters, allowance }
    }

    /// Notes a command that is about to be sent.
    pub(super) fn commanded(&mut self, id: u64, command: &VmmCommand) -> Result<(), String> {
        if self.commands.len() >= UNANSWERED {
            return Err(format!("it has not responded to {UNANSWERED} commands"));
        }
        let answers = match command {
            VmmCommand::Stats => Expected::Stats,
            VmmCommand::ConsoleInput { bytes } => Expected::ConsoleTaken(bytes.len()),
            VmmCommand::Revoke { .. } => Expected::Revoked,
            _ => Expected::Done,
        };
        // A machine that is started, paused or booted anew reports its new state. No other command leads to a report of the
        // machine, and a process can have the agent repeat some of them: those about console and counters by its answers,
        // those about addresses by each reboot that it claims.
        // One that runs may be paused at once by a full disk, which has two events.
        let leads_to = match command {
            VmmCommand::Run => 3,
            VmmCommand::Pause | VmmCommand::Reboot => 1,
            _ => 0,
        };
        for _ in 0..leads_to {
            self.allowance.0.lock().unwrap_or_else(PoisonError::into_inner).machine_events.bucket.put_back();
        }
        self.commands.insert(id, answers);
        Ok(())
    }

    /// Forgets a command that could not be sent.
    pub(super) fn withdrawn(&mut self, id: u64) {
        self.commands.remove(&id);
    }

    /// Checks whether the message, of `length` bytes, may come now.
    ///
    /// # Errors
    /// The violation, as a clause about the process: `it sent …`.
    pub(super) fn check(&mut self, message: &ToAgent, length: usize) -> Result<(), String> {
        self.check_at(message, length, Instant::now())
    }

    fn check_at(&mut self, message: &ToAgent, length: usize, now: Instant) -> Result<(), String> {
        let budget: Option<fn(&mut Budgets) -> &mut Budget> = match message {
            ToAgent::Request { .. } => Some(|budgets| &mut budgets.requests),
            ToAgent::Event { event: VmmEvent::Relay { .. }, .. } => Some(|budgets| &mut budgets.relay_events),
            ToAgent::Event { .. } => Some(|budgets| &mut budgets.machine_events),
            // The number of commands bounds these, and a budget their bytes.
            _ => None,
        };
        if let Some(budget) = budget {
            if length > LONGEST {
                return Err(format!("it sent a message of {length} bytes, more than {LONGEST}"));
            }
            self.allowance.spend(budget, now)?;
        }
        match message {
            ToAgent::Hello { .. } | ToAgent::Refused { .. } => Err("it sent a second handshake".into()),
            ToAgent::Done { id, result } => {
                let answers = self.commands.remove(id);
                let answers =
                    answers.ok_or_else(|| format!("it completed the command {id}, which was not sent"))?;
                // A process cannot have the agent repeat the command for counters, which are long: clients of the API do.
                if answers != Expected::Stats {
                    self.allowance.spend_response(length, now)?;
                }
                match result {
                    Ok(outcome) if !fits(answers, outcome) => {
                        Err("it completed a command with the result of another command".into())
                    }
                    _ => Ok(()),
                }
            }
            ToAgent::Event { seq, event } => {
                if let VmmEvent::Relay { adapter, .. } = event {
                    self.own(adapter)?;
                }
                follows(&mut self.event, *seq, "report")
            }
            ToAgent::Request { id, request: AgentRequest::Mailbox { adapter, .. } } => {
                self.own(adapter)?;
                follows(&mut self.request, *id, "request")
            }
        }
    }

    fn own(&self, adapter: &str) -> Result<(), String> {
        let own = self.adapters.contains(adapter);
        if own { Ok(()) } else { Err("it sent a message for an adapter that its VM does not have".into()) }
    }
}

/// Numbers increase. (Not by one: a vmm without an agent drops its oldest events.)
fn follows(last: &mut u64, number: u64, what: &str) -> Result<(), String> {
    if number <= *last {
        return Err(format!("its {what} {number} came after {last}", last = *last));
    }
    *last = number;
    Ok(())
}

fn fits(answers: Expected, outcome: &Outcome) -> bool {
    match (answers, outcome) {
        (Expected::Done, Outcome::Done)
        | (Expected::Stats, Outcome::Stats(_))
        | (Expected::Revoked, Outcome::Revoked { .. }) => true,
        (Expected::ConsoleTaken(most), Outcome::ConsoleTaken { taken }) => *taken <= most,
        _ => false,
    }
}

/// Whether a channel failed because of a message that no honest vmm sends.
pub(super) fn is_nonsense(error: &ChannelError) -> bool {
    matches!(error, ChannelError::Oversized | ChannelError::Descriptors | ChannelError::Malformed(_))
}

#[cfg(test)]
mod tests {
    use passthrough::relay::RelayEvent;
    use protocol::{DeviceLoss, Failure, FailureCode, State};

    use super::*;

    fn conduct(allowance: Allowance) -> Conduct {
        Conduct::new(allowance, ["eth0".to_owned()].into())
    }

    fn check(conduct: &mut Conduct, message: &ToAgent) -> Result<(), String> {
        conduct.check(message, 100)
    }

    fn done(id: u64, outcome: Outcome) -> ToAgent {
        ToAgent::Done { id, result: Ok(outcome) }
    }

    fn event(seq: u64) -> ToAgent {
        ToAgent::Event { seq, event: VmmEvent::State { state: State::Running, boots: 1 } }
    }

    #[test]
    fn each_command_has_one_response_of_its_own_kind() {
        let mut conduct = self::conduct(Allowance::new(1));
        let taken = |taken| Outcome::ConsoleTaken { taken };
        for (id, command) in
            [VmmCommand::Pause, VmmCommand::Stats, VmmCommand::ConsoleInput { bytes: vec![0; 3] }]
                .iter()
                .enumerate()
        {
            conduct.commanded(id as u64, command).unwrap();
        }
        assert!(check(&mut conduct, &done(7, Outcome::Done)).unwrap_err().contains("was not sent"));
        assert!(check(&mut conduct, &done(1, Outcome::Done)).unwrap_err().contains("another command"));
        check(&mut conduct, &done(2, taken(3))).unwrap();
        assert!(check(&mut conduct, &done(2, taken(3))).is_err(), "twice");
        let failure = Failure { code: FailureCode::WrongState, detail: String::new() };
        check(&mut conduct, &ToAgent::Done { id: 0, result: Err(failure) }).unwrap();
        conduct.commanded(9, &VmmCommand::ConsoleInput { bytes: vec![0; 3] }).unwrap();
        assert!(check(&mut conduct, &done(9, taken(4))).is_err(), "more than there was");
    }

    #[test]
    fn a_message_is_about_an_adapter_of_the_vm() {
        for (_, message, _) in KINDS {
            let mut conduct = self::conduct(Allowance::new(1));
            conduct.check(&message(1), 100).unwrap();
            let text = serde_json::to_string(&message(2)).unwrap();
            let foreign: ToAgent = serde_json::from_str(&text.replace("eth0", "eth1")).unwrap();
            let result = conduct.check(&foreign, 100);
            assert_eq!(result.is_err(), text.contains("eth0"), "{text}");
        }
    }

    #[test]
    fn numbers_grow_and_may_be_huge() {
        let mut conduct = self::conduct(Allowance::new(1));
        check(&mut conduct, &event(5)).unwrap();
        check(&mut conduct, &event(7)).unwrap();
        assert!(check(&mut conduct, &event(7)).unwrap_err().contains("report 7"));
        check(&mut conduct, &event(u64::MAX)).unwrap();
        assert!(check(&mut conduct, &event(1)).is_err());
    }

    /// Message `n` of a kind.
    type Kind = fn(u64) -> ToAgent;

    const KINDS: [(&str, Kind, u32); 3] = [
        (
            "requests",
            |id| ToAgent::Request {
                id,
                request: serde_json::from_value::<AgentRequest>(serde_json::json!({
                    "ask": "mailbox", "adapter": "eth0", "question": { "seq": 1, "request": "reset" },
                }))
                .unwrap(),
            },
            // With two adapters.
            2 * 50,
        ),
        (
            "events of relays",
            |seq| ToAgent::Event {
                seq,
                event: VmmEvent::Relay { adapter: "eth0".into(), event: RelayEvent::PfReset },
            },
            2 * 2 * 50,
        ),
        (
            "reports",
            |seq| ToAgent::Event {
                seq,
                event: VmmEvent::DeviceLost { bdf: "0000:01:10.0".into(), why: DeviceLoss::Failed },
            },
            4,
        ),
    ];

    #[test]
    fn each_kind_may_come_at_its_highest_honest_rate_for_hours_and_not_at_ten_times_that() {
        for (what, message, rate) in KINDS {
            let start = Instant::now();
            let after = |n: u64, rate: u32| start + Duration::from_secs(1) * u32::try_from(n).unwrap() / rate;
            let mut conduct = self::conduct(Allowance::new(2));
            for n in 1..u64::from(rate) * 3600 {
                conduct.check_at(&message(n), 100, after(n, rate)).unwrap();
            }
            let mut conduct = self::conduct(Allowance::new(2));
            let sent = (1..100_000)
                .take_while(|n| conduct.check_at(&message(*n), 100, after(*n, rate * 10)).is_ok())
                .count();
            assert!(sent < 1500, "{sent} {what}");
            let error = conduct.check_at(&message(100_000), 100, after(sent as u64, rate * 10)).unwrap_err();
            assert!(error.contains(what), "{error}");
            let long = self::conduct(Allowance::new(2)).check(&message(1), LONGEST + 1).unwrap_err();
            assert!(long.contains("4097 bytes"), "{long}");
        }
    }

    /// The agent asks for console output as fast as the process answers, and says the address at each reboot that it claims.
    #[test]
    fn a_command_that_leads_to_no_event_of_the_machine_buys_none() {
        let adapter = || "eth0".to_owned();
        let mac = "52:54:00:00:00:01".parse().unwrap();
        let commands: [(VmmCommand, Outcome); 4] = [
            (VmmCommand::ConsoleWait { offset: 1 }, Outcome::Done),
            (VmmCommand::EffectiveMac { adapter: adapter(), mac }, Outcome::Done),
            (VmmCommand::MakeGuestReset { adapter: adapter() }, Outcome::Done),
            (
                VmmCommand::Revoke { adapter: adapter(), changes: Vec::new() },
                Outcome::Revoked { failed: Vec::new(), deferred: false },
            ),
        ];
        for (command, outcome) in commands {
            let mut conduct = self::conduct(Allowance::new(1));
            let (begun, limit) = (Instant::now(), 2000);
            let taken = (0..limit).find(|n| {
                conduct.commanded(*n, &command).unwrap();
                conduct.check_at(&done(*n, outcome.clone()), 100, begun).unwrap();
                conduct.check_at(&event(*n + 1), 100, begun).is_err()
            });
            assert!(taken.is_some_and(|taken| taken < limit / 2), "{command:?}: {taken:?}");
        }
    }

    /// The agent asks for console output as fast as the process answers.
    #[test]
    fn long_responses_have_a_budget_of_bytes() {
        let begun = Instant::now();
        let respond =
            |conduct: &mut Conduct, n: u64, command: &VmmCommand, outcome: Outcome, length, after| {
                conduct.commanded(n, command).unwrap();
                conduct.check_at(&done(n, outcome), length, begun + after)
            };
        let wait = VmmCommand::ConsoleWait { offset: 1 };
        let mut conduct = self::conduct(Allowance::new(1));
        for n in 0..10_000 {
            respond(&mut conduct, n, &wait, Outcome::Done, SHORT, Duration::ZERO).unwrap();
            let stats = Outcome::Stats(Box::default());
            respond(&mut conduct, n, &VmmCommand::Stats, stats, 64 << 10, Duration::ZERO).unwrap();
        }
        let mut long = |after| respond(&mut conduct, 1, &wait, Outcome::Done, 64 << 10, after);
        let taken = (0..100).take_while(|_| long(Duration::ZERO).is_ok()).count();
        assert_eq!(taken, 4);
        let error = long(Duration::from_secs(3)).unwrap_err();
        assert!(error.contains("bytes of long responses"), "{error}");
        long(Duration::from_secs(5)).unwrap();
    }

    /// A vmm chooses when a connection ends, so a new one must not refill its budgets.
    #[test]
    fn another_connection_has_no_new_budgets() {
        for (what, message, _) in KINDS {
            let (allowance, now) = (Allowance::new(2), Instant::now());
            let connect = |_| {
                let mut conduct = self::conduct(allowance.clone());
                (1..300).map_while(|n| conduct.check_at(&message(n), 100, now).ok()).count()
            };
            let sent: usize = (0..100).map(connect).sum();
            assert!(sent <= 1024, "{sent} {what}");
        }
        let allowance = Allowance::new(2);
        let opened = (0..100).filter(|_| allowance.connect()).count();
        assert_eq!(opened, CONNECTIONS as usize);
    }

    #[test]
    fn a_command_may_be_followed_by_an_event() {
        let (mut conduct, now) = (self::conduct(Allowance::new(0)), Instant::now());
        for n in 1..5000 {
            conduct.commanded(n, &VmmCommand::Pause).unwrap();
            conduct.check_at(&done(n, Outcome::Done), 100, now).unwrap();
            conduct.check_at(&event(n), 100, now).unwrap();
        }
    }

    /// A user may repeat `vm resume` at any rate.
    #[test]
    fn a_machine_that_runs_may_be_out_of_room_at_once() {
        let (mut conduct, now) = (self::conduct(Allowance::new(0)), Instant::now());
        for n in 1..2000 {
            conduct.commanded(n, &VmmCommand::Run).unwrap();
            conduct.check_at(&done(n, Outcome::Done), 100, now).unwrap();
            for part in 1..=3 {
                conduct.check_at(&event(3 * n + part), 100, now).unwrap();
            }
        }
    }

    #[test]
    fn a_vmm_that_answers_nothing_is_given_up() {
        let mut conduct = self::conduct(Allowance::new(1));
        let result = (0..=UNANSWERED as u64).try_for_each(|id| conduct.commanded(id, &VmmCommand::Pause));
        assert!(result.is_err());
    }
}
