// SPDX-License-Identifier: Apache-2.0

//! A vmm without a machine: it speaks the control protocol, and obeys the words typed on its
//! console.
//!
//! The agent starts this test program like a vmm, as a test that acts only when it is called with a
//! descriptor and an id.

use std::{
    collections::VecDeque,
    fs::File,
    os::{
        fd::{FromRawFd, OwnedFd},
        unix::fs::FileExt,
    },
    time::{Duration, Instant},
};

use passthrough::relay::{Decision, Forwarded, GuestRequest, How, RelayEvent};
use protocol::{
    AgentRequest, AgentResponse, Channel, DeviceBackend, DeviceLoss, DeviceSpec, DiskLimits, End, Failure,
    FailureCode, Listener, Outcome, State, Stats, ToAgent, ToVmm, VmmCommand, VmmEvent,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use uuid::Uuid;

use super::fixture::Gates;

/// The name of the test that is the vmm.
pub(crate) const NAME: &str = "vm::tests::fake_vmm::fake_vmm";

/// The time after which a fake without an agent ends, so that a failed test leaves no process
/// behind.
const LONELY: Duration = Duration::from_secs(20);

const HALF_SECOND: Duration = Duration::from_millis(500);

#[test]
fn fake_vmm() {
    let mut arguments = std::env::args().rev();
    let vm = arguments.next().and_then(|last| Uuid::parse_str(&last).ok());
    let (Some(vm), Some("3")) = (vm, arguments.next().as_deref()) else { return };
    let gates = Gates(arguments.next().unwrap().into());
    gates.pass("start");
    // SAFETY: the agent gives its listening socket as number 3, and nothing else in this process knows it.
    let socket = unsafe { OwnedFd::from_raw_fd(3) };
    let mut fake = Fake {
        vm,
        gates,
        channel: None,
        state: State::Empty,
        boots: 0,
        seq: 0,
        events: VecDeque::new(),
        console: None,
        written: 0,
        waiters: Vec::new(),
        later: None,
        ended: false,
        asked: 0,
        confused: false,
        deaf: false,
        version: None,
    };
    fake.serve(&Listener::from_fd(socket));
    std::process::exit(0);
}

struct Fake {
    vm: Uuid,
    gates: Gates,
    channel: Option<Channel>,
    state: State,
    boots: u64,
    seq: u64,
    events: VecDeque<(u64, VmmEvent)>,
    console: Option<File>,
    written: u64,
    waiters: Vec<(u64, u64)>,
    later: Option<(Instant, String)>,
    ended: bool,
    asked: u64,
    /// Completes commands with the outcome of another one.
    confused: bool,
    /// Does not react to its power button.
    deaf: bool,
    /// Speaks this version from the next connection on.
    version: Option<u32>,
}

impl Fake {
    fn serve(&mut self, listener: &Listener) {
        let mut heard = Instant::now();
        loop {
            if self.ended && self.events.is_empty() {
                return;
            }
            assert!(heard.elapsed() < LONELY || self.channel.is_some(), "nobody talks to this vmm");
            if let Some((_, word)) = self.later.take_if(|(at, _)| *at <= Instant::now()) {
                self.obey(&word);
            }
            let mut fds = vec![PollFd::new(listener, PollFlags::IN)];
            fds.extend(self.channel.as_ref().map(|channel| PollFd::new(channel, PollFlags::IN)));
            let pause = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
            poll(&mut fds, Some(&pause)).unwrap();
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            drop(fds);
            if ready[0] {
                self.channel = Some(listener.accept().unwrap());
                heard = Instant::now();
                continue;
            }
            let Some(channel) = self.channel.as_ref().filter(|_| ready.get(1) == Some(&true)) else {
                continue;
            };
            heard = Instant::now();
            match channel.receive::<ToVmm>() {
                Ok((message, fds)) => self.on_message(message, fds),
                Err(_) => self.channel = None,
            }
        }
    }

    fn say(&self, message: &ToAgent) {
        if let Some(channel) = &self.channel {
            drop(channel.send(message, &[]));
        }
    }

    fn emit(&mut self, event: VmmEvent) {
        self.seq += 1;
        self.events.push_back((self.seq, event.clone()));
        self.say(&ToAgent::Event { seq: self.seq, event });
    }

    fn enter(&mut self, state: State) {
        self.state = state;
        self.emit(VmmEvent::State { state, boots: self.boots });
    }

    fn reboot(&mut self) {
        self.enter(State::Rebooting);
        self.boots += 1;
        self.enter(State::Running);
    }

    fn on_message(&mut self, message: ToVmm, fds: Vec<OwnedFd>) {
        match message {
            ToVmm::Hello { newest, vm, .. } => {
                assert_eq!(vm, self.vm);
                self.say(&ToAgent::Hello {
                    version: self.version.unwrap_or(newest),
                    state: self.state,
                    boots: self.boots,
                });
                for (seq, event) in self.events.clone() {
                    self.say(&ToAgent::Event { seq, event });
                }
            }
            // The fake sends its requests in spite of a standing denial.
            ToVmm::Standing { .. } => {}
            ToVmm::Noted { upto } => self.events.retain(|(seq, _)| *seq > upto),
            ToVmm::Response { response: AgentResponse::Mailbox { adapter, verdict }, .. } => {
                // Its PF acknowledges every forwarded message.
                if let Decision::Grant { how: How::Forward } = verdict.decision {
                    let event = RelayEvent::Forwarded { seq: verdict.seq, outcome: Forwarded::Accepted };
                    self.emit(VmmEvent::Relay { adapter, event });
                }
            }
            ToVmm::Command { id, command } => {
                if let Some(result) = self.on_command(id, command, fds) {
                    self.say(&ToAgent::Done { id, result });
                }
            }
        }
    }

    fn on_command(
        &mut self,
        id: u64,
        command: VmmCommand,
        fds: Vec<OwnedFd>,
    ) -> Option<Result<Outcome, Failure>> {
        match command {
            VmmCommand::Configure { .. } => self.gates.pass("configure"),
            VmmCommand::Run => self.gates.pass("run"),
            VmmCommand::Reboot => self.gates.pass("reboot"),
            VmmCommand::Stop => self.gates.pass("stop"),
            _ => {}
        }
        match command {
            VmmCommand::Configure { spec, files } => match spec.cmdline.as_str() {
                "refuse-kernel" => {
                    let failure = Failure { code: FailureCode::Kernel, detail: "It is no kernel".into() };
                    return Some(Err(failure));
                }
                "refuse-memory" => {
                    let failure = Failure { code: FailureCode::Memory, detail: "There is none".into() };
                    return Some(Err(failure));
                }
                "die" => std::process::exit(7),
                "hang-up" => {
                    self.channel = None;
                    return None;
                }
                _ => {
                    let simulated = |device: &&DeviceSpec| device.backend == DeviceBackend::Simulated;
                    let connections = spec.devices.iter().filter(simulated).count();
                    let disks: usize = spec.disks.iter().map(|disk| 1 + disk.backing.len()).sum();
                    assert_eq!(fds.len(), 3 + connections + disks, "/dev/kvm, console, kernel, VFs, disks");
                    for disk in &spec.disks {
                        self.limits(&disk.id, disk.limits);
                    }
                    let console = files.iter().zip(fds).find(|(name, _)| *name == "console");
                    self.console = console.map(|(_, fd)| File::from(fd));
                    self.enter(State::Ready);
                }
            },
            VmmCommand::Run => {
                self.boots = self.boots.max(1);
                self.enter(State::Running);
            }
            VmmCommand::Pause => self.enter(State::Paused),
            VmmCommand::Reboot => self.reboot(),
            VmmCommand::PowerButton if self.deaf => {}
            VmmCommand::PowerButton => self.later = Some((Instant::now(), "poweroff".into())),
            VmmCommand::Stop => {
                self.say(&ToAgent::Done { id, result: Ok(Outcome::Done) });
                std::process::exit(0);
            }
            VmmCommand::Revoke { changes, .. } => {
                return Some(Ok(Outcome::Revoked { failed: changes, deferred: false }));
            }
            VmmCommand::LimitDisk { disk, limits } => {
                if limits.operations.is_some_and(|rate| rate.per_second == 13) {
                    let failure = Failure { code: FailureCode::Device, detail: "The disk is busy".into() };
                    return Some(Err(failure));
                }
                self.limits(&disk, limits);
            }
            VmmCommand::Stats if self.confused => return Some(Ok(Outcome::Done)),
            VmmCommand::Stats => {
                return Some(Ok(Outcome::Stats(Box::new(Stats { boots: self.boots, ..Stats::default() }))));
            }
            VmmCommand::ConsoleInput { bytes } => {
                let taken = bytes.len();
                self.say(&ToAgent::Done { id, result: Ok(Outcome::ConsoleTaken { taken }) });
                self.obey(&String::from_utf8(bytes).unwrap());
                return None;
            }
            VmmCommand::ConsoleWait { offset } => {
                self.waiters.push((id, offset));
                self.wake();
                return None;
            }
            _ => {}
        }
        Some(Ok(Outcome::Done))
    }

    /// Shows the limits of a disk to the test.
    fn limits(&self, disk: &str, limits: DiskLimits) {
        std::fs::create_dir_all(&self.gates.0).unwrap();
        let path = self.gates.0.join(format!("limits-{disk}"));
        std::fs::write(path, serde_json::to_string(&limits).unwrap()).unwrap();
    }

    fn wake(&mut self) {
        let written = self.written;
        let (ready, rest) = self.waiters.drain(..).partition(|(_, offset)| written > *offset);
        self.waiters = rest;
        let ready: Vec<(u64, u64)> = ready;
        for (id, _) in ready {
            self.say(&ToAgent::Done { id, result: Ok(Outcome::Done) });
        }
    }

    fn obey(&mut self, words: &str) {
        let (word, rest) = words.split_once(' ').unwrap_or((words, ""));
        match word {
            "crash" => {
                eprintln!("last words of the fake");
                std::process::abort();
            }
            "deaf" => self.deaf = true,
            "reset" => self.reboot(),
            "poweroff" => self.end(End::PoweredOff),
            "fail" => self.end(End::Failed { detail: "The guest did something unspeakable".into() }),
            "poweroff-later" | "crash-later" => {
                let at = Instant::now() + Duration::from_millis(200);
                self.later = Some((at, word.trim_end_matches("-later").into()));
            }
            "lose" => self.emit(VmmEvent::DeviceLost { bdf: rest.into(), why: DeviceLoss::Requested }),
            "break" => self.emit(VmmEvent::DeviceLost { bdf: rest.into(), why: DeviceLoss::Failed }),
            "full" => {
                self.emit(VmmEvent::DiskFull { disk: rest.into() });
                self.enter(State::Paused);
            }
            "ask" => {
                self.asked += 1;
                let guest_request =
                    GuestRequest { seq: self.asked, request: serde_json::from_str(rest).unwrap() };
                let request = AgentRequest::Mailbox { adapter: "eth0".into(), guest_request };
                self.say(&ToAgent::Request { id: self.asked, request });
            }
            // As a guest that resets itself, and makes requests, as fast as vmm and relay let it.
            "at-highest-rate" => {
                (0..8).for_each(|_| self.reboot());
                self.ask_often(64);
                self.later = Some((Instant::now() + HALF_SECOND, format!("half-second {rest}")));
            }
            "half-second" => {
                self.reboot();
                self.ask_often(25);
                let left: u32 = rest.parse().unwrap();
                if left > 1 {
                    self.later = Some((Instant::now() + HALF_SECOND, format!("half-second {}", left - 1)));
                }
            }
            "nonsense" => self.talk_nonsense(rest),
            "print" => {
                let console = self.console.as_ref().unwrap();
                console.write_all_at(rest.as_bytes(), 4096 + self.written).unwrap();
                self.written += rest.len() as u64;
                console.write_all_at(&self.written.to_le_bytes(), 0).unwrap();
                self.wake();
            }
            _ => {}
        }
    }

    /// Makes requests that the default policy denies.
    fn ask_often(&mut self, times: u32) {
        let request = netpolicy::Request::SetMac("02:00:00:00:00:66".parse().unwrap());
        let word = format!("ask {}", serde_json::to_string(&request).unwrap());
        (0..times).for_each(|_| self.obey(&word));
    }

    /// Sends messages that no real vmm sends.
    fn talk_nonsense(&mut self, kind: &str) {
        let raw = |bytes: &[u8]| {
            rustix::net::send(self.channel.as_ref().unwrap(), bytes, rustix::net::SendFlags::NOSIGNAL)
                .unwrap()
        };
        let running = VmmEvent::State { state: State::Running, boots: 1 };
        let request = |adapter: &str| {
            let guest_request = GuestRequest { seq: 9, request: netpolicy::Request::Reset };
            AgentRequest::Mailbox { adapter: adapter.into(), guest_request }
        };
        match kind {
            "garbage" => drop(raw(b"\xff{}")),
            "unknown" => drop(raw(br#"{"type": "coup"}"#)),
            "long" => drop(raw(&vec![b' '; protocol::FRAME_MAX + 1])),
            "hello" => self.say(&ToAgent::Hello { version: 1, state: State::Running, boots: 1 }),
            "refused" => self.say(&ToAgent::Refused { reason: "no".into() }),
            "answer" => self.say(&ToAgent::Done { id: 1 << 40, result: Ok(Outcome::Done) }),
            "again" => self.say(&ToAgent::Done { id: 1, result: Ok(Outcome::Done) }),
            "report" => self.say(&ToAgent::Event { seq: 1, event: running }),
            "foreign-ask" => self.say(&ToAgent::Request { id: 1 << 40, request: request("eth9") }),
            "foreign-notice" => {
                let event = RelayEvent::Forwarded { seq: 1, outcome: Forwarded::Accepted };
                let event = VmmEvent::Relay { adapter: "other/eth0".into(), event };
                self.say(&ToAgent::Event { seq: 1 << 40, event });
            }
            "flood" => {
                for id in 0..200_000 {
                    self.say(&ToAgent::Request { id: (1 << 40) + id, request: request("eth0") });
                }
            }
            "confused" => self.confused = true,
            "fewer-boots" => {
                self.boots = 0;
                self.enter(State::Running);
            }
            "huge" => {
                self.seq = u64::MAX - 10;
                self.emit(running);
            }
            "old" => {
                self.version = Some(protocol::DISK_COMMANDS_SINCE - 1);
                self.channel = None;
            }
            "version" => {
                self.version = Some(99);
                self.channel = None;
            }
            _ => {}
        }
    }

    fn end(&mut self, end: End) {
        self.state = State::Ended;
        self.emit(VmmEvent::Ended { end });
        self.ended = true;
    }
}
