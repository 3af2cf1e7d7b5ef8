// SPDX-License-Identifier: Apache-2.0

//! Handlers of the agent's commands, responses and standing denials: the states in which a command is allowed, and
//! its effect on the machine. The guest's resets are here, too, since they share code with the agent's reboots.

use std::{
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use devices::machine::MachineEvent;
use event_manager::EventOps;
use failpoints::{Point, reach};
use netpolicy::StandingRefusal;
use passthrough::relay::Relay;
use protocol::{
    AgentResponse, End, Failure, FailureCode, FileError, Files, MachineSpec, Outcome, State, VmmCommand,
    VmmEvent,
};

use super::{event_loop::Process, resets::Reset};
use crate::{
    board::{DiskError, Disks},
    io_threads::{IoThreadError, IoThreads},
    machine::{Machine, MachineError, chain},
    vcpu,
};

/// The most bytes that one [`VmmCommand::ConsoleInput`] can type.
const INPUT_MAX: usize = 1024;

/// The longest time for which a reset waits for a request to a disk: a large flush to a slow disk takes minutes.
const BUSY: Duration = Duration::from_secs(if cfg!(test) { 4 } else { 300 });
/// The time of one check for the end of such a request. The event loop serves nothing else meanwhile.
const LOOK: Duration = Duration::from_millis(50);
/// The time between two attempts to pause the machine for a full disk.
const PAUSE_AGAIN: Duration = Duration::from_secs(1);

fn failure(code: FailureCode, detail: impl Into<String>) -> Failure {
    Failure { code, detail: detail.into() }
}

/// A command that waits for the growth of a disk.
pub(super) struct Growth {
    command: u64,
    disk: String,
    /// The growth's number: a growth of an earlier connection may have a result, too.
    number: u64,
}

fn disk_failure(error: &DiskError) -> Failure {
    let code = match error {
        DiskError::Unknown(_) | DiskError::Sectors(_) => FailureCode::Invalid,
        DiskError::Grow { .. } => FailureCode::Disk,
    };
    failure(code, chain(error))
}

impl Process {
    pub(super) fn handle_command(
        &mut self,
        id: u64,
        command: VmmCommand,
        fds: Vec<OwnedFd>,
        ops: &mut EventOps<'_>,
    ) {
        let result = match command {
            VmmCommand::Configure { spec, files } => self.configure(&spec, Files::new(files, fds), ops),
            VmmCommand::Run => self.run(),
            VmmCommand::Pause => self.pause(),
            VmmCommand::PowerButton => self.press_power_button(),
            VmmCommand::Reboot => self.reboot_on_command(),
            VmmCommand::Stats => self.stats(),
            VmmCommand::ConsoleInput { bytes } => self.console_input(&bytes),
            VmmCommand::ConsoleWait { offset } => return self.wait_for_console(id, offset),
            VmmCommand::Revoke { adapter, changes } => match self.relay(&adapter) {
                // The relay's event `Revoked` completes the command.
                Ok(relay) => {
                    relay.revoke(id, changes);
                    return self.await_revocation(id);
                }
                Err(failure) => Err(failure),
            },
            VmmCommand::EffectiveMac { adapter, mac } => self.relay(&adapter).map(|relay| {
                relay.set_effective_mac(mac);
                Outcome::Done
            }),
            VmmCommand::MakeGuestReset { adapter } => self.relay(&adapter).map(|relay| {
                relay.make_guest_reset();
                Outcome::Done
            }),
            VmmCommand::LimitDisk { disk, limits } => self.on_disk(|disks| disks.limit(&disk, &limits)),
            VmmCommand::GrowDisk { disk, size } => match self.grow_disk(&disk, size) {
                // The disk's thread completes the command.
                Ok(number) => return self.growths.push(Growth { command: id, disk, number }),
                Err(failure) => Err(failure),
            },
            VmmCommand::Stop => {
                reach(Point::VmmStopping);
                self.end(End::Stopped);
                self.stop_commanded = true;
                Ok(Outcome::Done)
            }
        };
        self.done(id, result);
    }

    fn wrong_state(&self, what: &str) -> Failure {
        failure(FailureCode::WrongState, format!("Cannot {what} a VM that is {}", self.state.name()))
    }

    fn configure(
        &mut self,
        spec: &MachineSpec,
        files: Result<Files, FileError>,
        ops: &mut EventOps<'_>,
    ) -> Result<Outcome, Failure> {
        if self.state != State::Empty {
            return Err(self.wrong_state("configure"));
        }
        if spec.vm != self.vm {
            return Err(failure(FailureCode::Invalid, "The specification is for another VM"));
        }
        if spec.cpus == 0 || spec.cpus == u8::MAX {
            return Err(failure(FailureCode::Invalid, format!("A VM has 1 to 254 vCPUs, not {}", spec.cpus)));
        }
        let files = files.map_err(|error| failure(FailureCode::Invalid, error.to_string()))?;
        let made = self
            .namespaces
            .take()
            .ok_or_else(|| failure(FailureCode::Invalid, "The VM was configured before"))?;
        match Machine::build(spec, files, &self.relays, made) {
            Ok((machine, signals)) => {
                self.machine = Some(machine);
                for (adapter, refusal) in &self.standing {
                    if let Ok(relay) = self.relay(adapter) {
                        relay.set_standing_refusal(Some(refusal.clone()));
                    }
                }
                self.listen_to(signals, ops);
                self.enter(State::Ready);
                reach(Point::VmmBuilt);
                Ok(Outcome::Done)
            }
            Err(error) => {
                // The process may already have lost its privileges, so it cannot try again.
                let failure = error.failure();
                self.end(End::Failed { detail: failure.detail.clone() });
                Err(failure)
            }
        }
    }

    fn machine(&self) -> Result<&Machine, Failure> {
        self.machine.as_ref().ok_or_else(|| self.wrong_state("control"))
    }

    fn relay(&self, adapter: &str) -> Result<Arc<Relay>, Failure> {
        self.machine()?.devices.relay(adapter).ok_or_else(|| {
            failure(FailureCode::Invalid, format!("The VM has no adapter {adapter} under policy"))
        })
    }

    fn on_disk(&self, command: impl FnOnce(&Disks) -> Result<(), DiskError>) -> Result<Outcome, Failure> {
        command(&self.machine()?.disks).map(|()| Outcome::Done).map_err(|error| disk_failure(&error))
    }

    fn grow_disk(&mut self, disk: &str, size: u64) -> Result<u64, Failure> {
        // The disks' threads of another machine are parked.
        if self.state != State::Running {
            return Err(self.wrong_state("enlarge a disk of"));
        }
        if self.growths.iter().any(|growth| growth.disk == disk) {
            let detail = format!("The disk {disk} is being enlarged by another request: try again later");
            return Err(failure(FailureCode::WrongState, detail));
        }
        self.last_growth += 1;
        self.on_disk(|disks| disks.grow(disk, self.last_growth, size))?;
        Ok(self.last_growth)
    }

    /// Completes the commands whose disks have grown, or cannot grow.
    pub(super) fn complete_growths(&mut self) {
        let Some(machine) = &self.machine else { return };
        let mut results = Vec::new();
        self.growths.retain(|growth| match machine.disks.grown(&growth.disk, growth.number) {
            None => true,
            Some(result) => {
                results.push((growth.command, result));
                false
            }
        });
        // Only now: a failure to send ends the connection, and with it the other growths' commands.
        for (command, result) in results {
            self.done(command, result.map(|()| Outcome::Done).map_err(|error| disk_failure(&error)));
        }
    }

    /// Ends all growths that are not complete, because no disk's thread works any more. The disks keep their sizes.
    pub(super) fn cancel_growths(&mut self) {
        self.complete_growths();
        for growth in std::mem::take(&mut self.growths) {
            if let Some(machine) = &self.machine {
                machine.disks.cancel_growth(&growth.disk);
            }
            let failure = self.wrong_state("enlarge a disk of");
            self.done(growth.command, Err(failure));
        }
    }

    pub(super) fn on_standing(&mut self, adapter: String, refusal: Option<StandingRefusal>) {
        if let Ok(relay) = self.relay(&adapter) {
            relay.set_standing_refusal(refusal.clone());
        }
        match refusal {
            Some(refusal) => drop(self.standing.insert(adapter, refusal)),
            None => drop(self.standing.remove(&adapter)),
        }
    }

    /// Clears all standing denials, which are valid only as long as the connection that brought them. From then on,
    /// relays request each verdict.
    pub(super) fn forget_standing(&mut self) {
        for (adapter, _) in std::mem::take(&mut self.standing) {
            if let Ok(relay) = self.relay(&adapter) {
                relay.set_standing_refusal(None);
            }
        }
    }

    pub(super) fn on_response(&self, response: AgentResponse) {
        let AgentResponse::Mailbox { adapter, verdict } = response;
        reach(Point::VmmAnswered);
        // Drop a response for an adapter that was lost meanwhile.
        if let Ok(relay) = self.relay(&adapter) {
            relay.verdict(verdict);
        }
    }

    fn run(&mut self) -> Result<Outcome, Failure> {
        match self.state {
            State::Running => return Ok(Outcome::Done),
            State::Ready | State::Paused => {}
            _ => return Err(self.wrong_state("run")),
        }
        if self.reset_due.is_none() {
            self.machine()?.run().map_err(|e| e.failure())?;
        }
        if self.state == State::Ready {
            self.boots += 1;
            self.resets.booted(Instant::now());
        }
        self.enter(State::Running);
        reach(Point::VmmRun);
        Ok(Outcome::Done)
    }

    fn pause(&mut self) -> Result<Outcome, Failure> {
        match self.state {
            State::Paused => return Ok(Outcome::Done),
            State::Running => {}
            _ => return Err(self.wrong_state("pause")),
        }
        self.park(IoThreads::LONGEST)?;
        self.enter(State::Paused);
        self.cancel_growths();
        Ok(Outcome::Done)
    }

    /// Stops the machine. If a disk is busy for the time `within`, this fails and the machine runs on. Any other failure
    /// ends the machine, because only a part of it has stopped.
    fn park(&mut self, within: Duration) -> Result<(), Failure> {
        let Err(error) = self.machine()?.park(within) else { return Ok(()) };
        let failure = error.failure();
        if !matches!(error, MachineError::IoThread(IoThreadError::Silent(_))) {
            self.end(End::Failed { detail: failure.detail.clone() });
        }
        Err(failure)
    }

    fn press_power_button(&mut self) -> Result<Outcome, Failure> {
        if self.state != State::Running {
            return Err(self.wrong_state("press the power button of"));
        }
        let pressed = self.machine()?.board.acpi.press_power_button();
        pressed
            .map_err(|e| failure(FailureCode::Internal, format!("Cannot signal the power button: {e}")))?;
        Ok(Outcome::Done)
    }

    fn reboot_on_command(&mut self) -> Result<Outcome, Failure> {
        if !matches!(self.state, State::Running | State::Paused) {
            return Err(self.wrong_state("reboot"));
        }
        // If a disk stays busy, this fails and the guest runs on.
        self.park(IoThreads::LONGEST)?;
        self.reboot().map_err(|e| e.failure())?;
        Ok(Outcome::Done)
    }

    /// Handles a reset by the guest: makes it now, delays it to keep the rate, or gives up the guest.
    fn on_guest_reset(&mut self) {
        // The requests of the boot that has ended wait for no room any more.
        self.full = None;
        match self.resets.request(Instant::now()) {
            // A paused machine is reset when it resumes.
            Reset::At(at) if self.state == State::Paused => self.reset_due = Some(at),
            Reset::At(at) if at <= Instant::now() => {
                // If this fails, it has already ended the machine and reported the failure.
                let _ = self.reboot();
            }
            Reset::At(at) => {
                // The other vCPUs still run the boot that has ended: park them until the reset.
                match self.machine.as_ref().map_or(Ok(()), |machine| machine.stop(IoThreads::LONGEST)) {
                    // A disk may be busy for now. The reset waits for it.
                    Ok(()) | Err(MachineError::IoThread(IoThreadError::Silent(_))) => {
                        self.reset_due = Some(at)
                    }
                    Err(error) => {
                        self.end(End::Failed {
                            detail: format!("Cannot reboot: {}", error.failure().detail),
                        });
                    }
                }
            }
            Reset::GivenUp(times) => {
                let detail = format!(
                    "The guest has reset its machine {times} times in a row, each time within a second of its start: its \
                     kernel crashes at once"
                );
                self.end(End::Failed { detail });
            }
        }
    }

    /// Makes a delayed reset once its time has come.
    pub(super) fn make_due_reset(&mut self) {
        let due = self.reset_due.is_some_and(|due| due <= Instant::now());
        if due && matches!(self.state, State::Running | State::Rebooting) {
            let _ = self.reboot();
        }
    }

    /// Resets the machine and runs it again. While a disk is busy with a request of the last boot, tries again later. A
    /// failure ends the machine.
    fn reboot(&mut self) -> Result<(), MachineError> {
        self.reset_due = None;
        self.full = None;
        let first = self.state != State::Rebooting;
        if first {
            self.reset_began = Instant::now();
            self.enter(State::Rebooting);
        }
        let Some(machine) = &mut self.machine else { return Ok(()) };
        let reset = machine.reset(if first { IoThreads::LONGEST } else { LOOK });
        if let Err(MachineError::IoThread(IoThreadError::Silent(_))) = reset
            && self.reset_began.elapsed() < BUSY
        {
            self.reset_due = Some(Instant::now() + LOOK * 4);
            return Ok(());
        }
        self.forget_vcpu_events();
        reach(Point::VmmReset);
        let Some(machine) = &mut self.machine else { return Ok(()) };
        match reset.and_then(|()| machine.run()) {
            Ok(()) => {
                self.boots += 1;
                self.resets.booted(Instant::now());
                self.enter(State::Running);
                Ok(())
            }
            Err(error) => {
                self.end(End::Failed { detail: format!("Cannot reboot: {}", error.failure().detail) });
                Err(error)
            }
        }
    }

    pub(super) fn on_vcpu_event(&mut self, event: vcpu::Event) {
        // Drop events from before the machine was stopped or parked for a reset: the stop or reset makes them void.
        if !matches!(self.state, State::Running | State::Paused) || self.reset_due.is_some() {
            return;
        }
        // Not at info: a guest that resets in a loop must not fill the log while no agent limits it.
        tracing::debug!(vm = %self.vm, ?event, "A thread of the machine stopped");
        match event {
            vcpu::Event::Machine(MachineEvent::PowerOff) => self.end(End::PoweredOff),
            vcpu::Event::Machine(MachineEvent::Reset) => self.on_guest_reset(),
            vcpu::Event::Broken { index, what } => {
                self.end(End::Failed { detail: format!("vCPU {index} cannot continue: {what}") });
            }
            vcpu::Event::DiskFull { disk } => self.on_disk_full(disk),
            // The event loop completes such commands at each event.
            vcpu::Event::DiskGrown => {}
            vcpu::Event::IoThreadEnded { name } => {
                self.end(End::Failed { detail: IoThreadError::Ended(name).to_string() });
            }
        }
    }

    /// Pauses the machine until there is room: a guest whose writes fail could lose its file system.
    fn on_disk_full(&mut self, disk: String) {
        // A machine that runs on lets its full disk try again, which stalls again and sends another event.
        if self.full.is_none() {
            self.full = Some((disk, Instant::now()));
            self.make_due_pause();
        }
    }

    /// Pauses the machine for a full disk once it is time. While another disk is busy the machine runs on, and commands are
    /// not held up.
    pub(super) fn make_due_pause(&mut self) {
        let Some((disk, _)) = self.full.take_if(|(_, due)| *due <= Instant::now()) else { return };
        if self.state == State::Running && self.park(LOOK).is_err() {
            // Any other failure has ended the machine.
            self.full = (self.state == State::Running).then(|| (disk, Instant::now() + PAUSE_AGAIN));
            return;
        }
        self.emit(VmmEvent::DiskFull { disk });
        if self.state == State::Running {
            self.enter(State::Paused);
            self.cancel_growths();
        }
    }

    fn stats(&self) -> Result<Outcome, Failure> {
        Ok(Outcome::Stats(Box::new(self.machine()?.stats(self.started, self.boots))))
    }

    fn console_input(&self, bytes: &[u8]) -> Result<Outcome, Failure> {
        let taken = self.machine()?.board.serial.enqueue(bytes.get(..INPUT_MAX).unwrap_or(bytes));
        Ok(Outcome::ConsoleTaken { taken })
    }
}
