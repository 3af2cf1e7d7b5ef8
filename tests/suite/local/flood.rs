// SPDX-License-Identifier: Apache-2.0

//! A vmm that has been taken over repeats each kind of message of the control protocol.
//!
//! At the highest honest rate nothing is killed and nothing is lost. At ten times that rate the process is killed. Until then
//! the agent's processor time, writes, log and memory stay below bounds, and so does the time in which it responds to its
//! clients. No bound depends on an idle machine: costs are counted, and times are compared with those of the same client
//! without a flood.

mod kinds;

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    thread,
    time::{Duration, Instant},
};

use api::types::{CauseCode, PortGroupSpec, VmState};
use protocol::FRAME_MAX;
use serde_json::json;

use crate::fixture::{Agent, Options, SmallGuest, played::Played, wire};
use kinds::{E, KINDS, Kind, Q, Says, U};

/// A VM that the test plays, and the address of its function.
struct Vm {
    name: String,
    bdf: String,
    played: Played,
}

impl Vm {
    fn say(&self, n: u64, says: Says) -> bool {
        match says {
            Q(request) => self.played.request(&request(n)),
            E(event) => self.played.emit(&event(n, &self.bdf)),
            U(message) => self.played.say(&message(n)),
        }
    }

    /// Sends messages of one kind at a rate of `per_second`, until `until` or the end of the connection.
    fn repeat(&self, says: Says, per_second: u32, until: Duration) -> u64 {
        let begun = Instant::now();
        let mut sent = 0;
        while begun.elapsed() < until {
            let due = u64::from(per_second) * u64::try_from(begun.elapsed().as_millis()).unwrap() / 1000;
            while sent < due {
                sent += 1;
                if !self.say(sent, says) {
                    return sent;
                }
            }
            thread::sleep(Duration::from_millis(2));
        }
        sent
    }
}

/// An agent with a VM for each of `names`. The test plays their vmms.
fn stage(names: &[String]) -> (Agent, Vec<Vm>) {
    // An 82576 has seven VFs.
    let pfs = (0..names.len().div_ceil(7)).flat_map(|n| ["--sim-pf".to_owned(), format!("sim{n}=7")]);
    let mut agent = Agent::start_with(Options { arguments: pfs.collect(), ..Options::default() });
    let group: PortGroupSpec =
        serde_json::from_value(json!({ "switch": "default", "settings": { "mac_changes": "accept" } }))
            .unwrap();
    agent.ask(agent.client.put_port_group("tests", &group, None)).unwrap();
    for name in names {
        drop(agent.boot(&SmallGuest::spec(
            &agent,
            name,
            json!([{ "id": "eth0", "port_group": "tests" }]),
            "",
        )));
    }
    let played = Played::take_over(&mut agent, names);
    let vms = names.iter().zip(played).map(|(name, played)| {
        let status = agent.wait_for_state(name, VmState::Running).status;
        Vm { name: name.clone(), bdf: status.adapters[0].vf.unwrap().to_string(), played }
    });
    let vms = vms.collect();
    (agent, vms)
}

/// The cost of an agent since its start.
#[derive(Clone, Copy, Debug)]
struct Cost {
    /// Processor time of all its threads, utime and stime of proc_pid_stat(5).
    cpu: Duration,
    /// Bytes that it wrote by system calls: to the database and its log, to sockets, to its own log.
    written: u64,
    lines: usize,
    line_bytes: usize,
    /// Anonymous memory in KiB.
    memory: u64,
}

impl Cost {
    fn of(agent: &Agent) -> Self {
        let read = |file: &str| fs::read_to_string(format!("/proc/{}/{file}", agent.pid())).unwrap();
        let number = |text: &str, name: &str| -> u64 {
            let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim().trim_end_matches(" kB").parse().unwrap()
        };
        let stat = read("stat");
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        // Fields 14 and 15 of the line, in ticks of 10 ms.
        let ticks: u64 = fields[11..13].iter().map(|field| field.parse::<u64>().unwrap()).sum();
        let log = agent.log();
        Self {
            cpu: Duration::from_millis(10 * ticks),
            written: number(&read("io"), "wchar:"),
            lines: log.lines().count(),
            line_bytes: log.len(),
            memory: number(&read("smaps_rollup"), "Pss_Anon:"),
        }
    }

    fn since(self, before: Self) -> Self {
        Self {
            cpu: self.cpu - before.cpu,
            written: self.written - before.written,
            lines: self.lines - before.lines,
            line_bytes: self.line_bytes - before.line_bytes,
            memory: self.memory.saturating_sub(before.memory),
        }
    }
}

/// Runs `work` with a client beside it. Returns also the time within which 99 of 100 of the client's requests got responses.
fn with_client<T>(agent: &Agent, work: impl FnOnce() -> T) -> (T, Duration) {
    let over = AtomicBool::new(false);
    let socket = agent.directory().join("api.sock");
    thread::scope(|scope| {
        let client = scope.spawn(|| {
            let mut took = Vec::new();
            while !over.load(SeqCst) || took.len() < 20 {
                let begun = Instant::now();
                let request = "GET /v1/vms/bystander HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
                assert_eq!(wire::exchange(wire::connect(&socket), request).status, 200);
                took.push(begun.elapsed());
                thread::sleep(Duration::from_millis(5));
            }
            took.sort();
            took[took.len() * 99 / 100]
        });
        let result = work();
        over.store(true, SeqCst);
        (result, client.join().unwrap())
    })
}

/// The time for which each kind is repeated at its honest rate.
const HONEST: Duration = Duration::from_millis(1500);

/// The longest time of a flood before the process is killed. The largest budget has 768 messages at once.
const FLOOD: Duration = Duration::from_secs(20);

/// The lowest rate of a flood in messages per second: budgets of rare messages would last too long for a test.
const LEAST: u32 = 500;

/// Bounds of one flood from its first message to the end of the process. At most some 1000 messages are handled.
const MOST: Cost = Cost {
    // 3 ms each, on the development profile.
    cpu: Duration::from_secs(3),
    // A record that shares its transaction writes some KiB. Each of some 530 states of the machine is a transaction of 18 KiB,
    // and every other one begins and ends a reboot of the port, a transaction each.
    written: 24 << 20,
    // A port may write 20 lines of each weight at once and then one per second; the end of a VM has less than ten.
    lines: 60,
    line_bytes: 30_000,
    // 1024 messages may wait, each of 4 KiB, and of a few times as much once it is decoded.
    memory: 32 * 1024,
};

/// The shortest time that counts as slow for a client on a busy machine.
const SLOW: Duration = Duration::from_secs(1);

fn assert_bounded(what: &str, cost: Cost, p99: Duration, usual: Duration) {
    assert!(cost.cpu <= MOST.cpu && cost.written <= MOST.written, "{what}: {cost:?}");
    assert!(cost.lines <= MOST.lines && cost.line_bytes <= MOST.line_bytes, "{what}: {cost:?}");
    assert!(cost.memory <= MOST.memory, "{what}: {cost:?}");
    assert!(p99 <= SLOW.max(usual * 20), "{what}: {p99:?}, without it {usual:?}");
}

/// Waits until the process has been killed for its messages.
fn assert_ended_for_it(agent: &Agent, vm: &Vm, what: &str) {
    let cause = agent.wait_for_state(&vm.name, VmState::Failed).status.cause.unwrap();
    assert_eq!(cause.code, CauseCode::VmmMisbehaved, "{what}: {cause:?}");
}

/// Whether the agent has handled all messages.
fn is_heard(vm: &Vm) -> bool {
    let heard = vm.played.heard();
    heard.responses.load(SeqCst) >= vm.played.requested() && heard.noted.load(SeqCst) >= vm.played.emitted()
}

/// Sends requests as a relay does: the next one after the response to the last.
fn request_in_turn(vm: &Vm, rate: u32, says: Says) -> u64 {
    let begun = Instant::now();
    let mut sent = 0;
    while begun.elapsed() < HONEST {
        sent += 1;
        let next = Instant::now() + Duration::from_secs(1) / rate;
        vm.say(sent, says);
        while Instant::now() < next || (!is_heard(vm) && begun.elapsed() < HONEST) {
            thread::sleep(Duration::from_millis(1));
        }
    }
    sent
}

fn honest(agent: &Agent, vm: &Vm, what: &str, rate: u32, says: Says) {
    let sent = match says {
        Q(_) => request_in_turn(vm, rate, says),
        _ => vm.repeat(says, rate, HONEST),
    };
    assert!(sent > 0, "{what}");
    let deadline = Instant::now() + Duration::from_secs(60);
    let heard = vm.played.heard();
    while !is_heard(vm) {
        assert!(
            Instant::now() < deadline,
            "{what}: {} of {} requests were answered, {} of {} events noted\n{}",
            heard.responses.load(SeqCst),
            vm.played.requested(),
            heard.noted.load(SeqCst),
            vm.played.emitted(),
            agent.log()
        );
        thread::sleep(Duration::from_millis(5));
    }
    let status = agent.vm(&vm.name).status;
    assert!(matches!(status.state, VmState::Running | VmState::Rebooting), "{what}: {status:?}");
}

#[test]
fn each_kind_of_message_is_heard_at_its_honest_rate_and_bounded_at_ten_times_that() {
    let mut names: Vec<String> = (0..KINDS.len()).map(|n| format!("vm{n}")).collect();
    names.push("bystander".into());
    let (agent, vms) = stage(&names);
    let ((), usual) = with_client(&agent, || thread::sleep(Duration::from_secs(1)));
    println!("usually {usual:?}");
    for (Kind(what, rate, says), vm) in KINDS.iter().zip(&vms) {
        if *rate > 0 {
            honest(&agent, vm, what, *rate, *says);
        }
        let before = Cost::of(&agent);
        let (sent, p99) = with_client(&agent, || {
            let sent = vm.repeat(*says, LEAST.max(10 * rate), FLOOD);
            assert_ended_for_it(&agent, vm, what);
            sent
        });
        let cost = Cost::of(&agent).since(before);
        println!("{what:36} {sent:5} messages, p99 {p99:9.2?}, {cost:?}");
        assert_bounded(what, cost, p99, usual);
    }
    assert_eq!(agent.vm("bystander").status.state, VmState::Running);
}

/// A hostile vmm that stays below each budget is never ended, so its share has a bound.
#[test]
fn a_vmm_just_below_its_budgets_costs_a_bounded_share() {
    const TIME: Duration = Duration::from_secs(6);
    let (agent, vms) = stage(&["low".into(), "bystander".into()]);
    let says = |name: &str| KINDS.iter().find(|Kind(kind, ..)| *kind == name).unwrap().2;
    let vm = &vms[0];
    let before = Cost::of(&agent);
    thread::scope(|scope| {
        scope.spawn(|| vm.repeat(says("ask/mailbox/set_mac"), 70, TIME));
        scope.spawn(|| vm.repeat(says("report/relay/declined"), 130, TIME));
        scope.spawn(|| vm.repeat(says("report/state"), 7, TIME));
    });
    let cost = Cost::of(&agent).since(before);
    println!("{cost:?}");
    let seconds = TIME.as_secs();
    // Half of a processor on the development profile, 4 MiB and two lines in a second, after the first burst. A granted change writes
    // about 46 kB: two states of the port and a decision, each a transaction of SQLite's pages of 4 KiB.
    assert!(cost.cpu <= TIME / 2, "{cost:?}");
    assert!(cost.written <= (4 << 20) * (1 + seconds), "{cost:?}");
    assert!(cost.lines <= 60 + 2 * usize::try_from(seconds).unwrap(), "{cost:?}");
    assert_eq!(agent.vm("low").status.cause, None);
}

/// The vmm chooses when a connection ends; with each new one come a greeting, work of the switch, and lines in the log.
#[test]
fn a_vmm_that_hangs_up_has_no_new_budgets() {
    const TIME: Duration = Duration::from_secs(15);
    let (agent, vms) = stage(&["fickle".into(), "bystander".into()]);
    let (vm, played) = (&vms[0], &vms[0].played);
    let before = Cost::of(&agent);
    let begun = Instant::now();
    let says = |name: &str| KINDS.iter().find(|Kind(kind, ..)| *kind == name).unwrap().2;
    let mut sent = 0;
    while begun.elapsed() < TIME && agent.vm("fickle").status.state != VmState::Failed {
        if !played.is_connected() {
            thread::sleep(Duration::from_millis(20));
            continue;
        }
        // Fewer than each budget of a connection.
        for kind in ["report/state", "report/relay/declined", "ask/mailbox/set_mac"] {
            sent += (0..250).filter(|n| vm.say(*n, says(kind))).count();
        }
        thread::sleep(Duration::from_millis(200));
        played.hang_up();
    }
    let cost = Cost::of(&agent).since(before);
    println!("{sent} messages on {} connections: {cost:?}", played.heard().connections.load(SeqCst));
    assert!(sent <= 3000, "{sent} messages were taken");
    // The bursts of all three budgets, and lines of two weights and of the port's jobs.
    let lines = 3 * (20 + usize::try_from(TIME.as_secs()).unwrap());
    assert!(cost.lines <= lines && cost.written <= 2 * MOST.written, "{cost:?}\n{}", agent.log());
}

/// The vmm ends its connection again and again, and does nothing else. Its VM is not ended for it, since a slow agent loses
/// connections, too.
#[test]
fn a_vmm_that_only_hangs_up_is_connected_to_less_and_less_often() {
    let (agent, vms) = stage(&["fickle".into(), "bystander".into()]);
    let played = &vms[0].played;
    let before = Cost::of(&agent);
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(20) {
        played.hang_up();
        thread::sleep(Duration::from_millis(10));
    }
    let cost = Cost::of(&agent).since(before);
    let connections = played.heard().connections.load(SeqCst);
    // One at the agent's start, a burst of eight, and one per ten seconds.
    assert!((5..=12).contains(&connections), "{connections}: {cost:?}");
    assert!(cost.lines <= 40, "{cost:?}\n{}", agent.log());
    assert_eq!(agent.vm("fickle").status.cause, None);
}

/// Bytes that are no message of the protocol.
#[test]
fn what_is_no_message_ends_the_process_at_a_bounded_cost() {
    type Sent = fn(&Vm) -> bool;
    let cases: [(&str, Sent); 5] = [
        ("garbage", |vm| vm.played.send(b"\xff{}", 0)),
        ("an unknown kind", |vm| vm.played.say(&json!({ "type": "coup" }))),
        ("a longer packet than any", |vm| vm.played.send(&vec![b' '; FRAME_MAX + 1], 0)),
        ("thousands of unknown fields", |vm| {
            let fields = vec![json!({}); 20_000];
            let state = json!({ "report": "state", "state": "running", "boots": 1, "x": fields });
            vm.played.emit(&state)
        }),
        ("descriptors", |vm| {
            let state = json!({
                "type": "report", "seq": 1, "report": { "report": "state", "state": "running", "boots": 1 },
            });
            vm.played.send(state.to_string().as_bytes(), 20)
        }),
    ];
    let mut names: Vec<String> = (0..cases.len()).map(|n| format!("vm{n}")).collect();
    names.push("bystander".into());
    let (agent, vms) = stage(&names);
    let ((), usual) = with_client(&agent, || thread::sleep(Duration::from_secs(1)));
    let descriptors = || fs::read_dir(format!("/proc/{}/fd", agent.pid())).unwrap().count();
    let had = descriptors();
    for ((what, sent), vm) in cases.iter().zip(&vms) {
        let before = Cost::of(&agent);
        let (said, p99) = with_client(&agent, || {
            let said = (0..1000).take_while(|_| sent(vm)).count();
            assert_ended_for_it(&agent, vm, what);
            said
        });
        assert!(said > 0, "{what}");
        let cost = Cost::of(&agent).since(before);
        println!("{what:30} {said:5} messages, p99 {p99:9.2?}, {cost:?}");
        assert_bounded(what, cost, p99, usual);
    }
    // The connections of the VMs are over, and no other descriptors were added.
    assert!(descriptors() <= had, "{} descriptors, {had} before", descriptors());
}
