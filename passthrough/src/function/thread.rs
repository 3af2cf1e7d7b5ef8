// SPDX-License-Identifier: Apache-2.0

//! The function's own thread: it does what may block.

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender},
    },
    time::{Duration, Instant},
};

use super::{ResetError, assigned::Shared, hardware_access::Begin};
use crate::hardware::VfHardware;

/// A guest's resets: so many in a period are carried out at once, later ones end no earlier than the period allows. A
/// reset of a VF costs the host (its PF driver writes filters anew), so a guest that resets in a loop is slowed down.
const GUEST_RESETS: usize = 8;
const GUEST_RESET_PERIOD: Duration = Duration::from_secs(4);

/// The kernel refuses a reset while somebody else holds the device's lock: it is tried again.
const TRIES: u32 = 10;
const TRY_AGAIN_AFTER: Duration = Duration::from_millis(50);

pub(super) enum Command {
    /// The guest asked for a reset; the gate is closed for it already.
    GuestReset,
    /// Reset to the state at power-on, tell the outcome.
    PowerOn(SyncSender<Result<(), ResetError>>),
    /// The function was closed: let go of the hardware, and end.
    Release(Option<Arc<dyn VfHardware>>),
}

/// Commands are few: a guest's resets are one at a time, the others come from the vmm.
pub(super) type Commands = Sender<Command>;

pub(super) struct Worker {
    shared: Arc<Shared>,
    commands: Receiver<Command>,
    /// When the last guest resets ended.
    recent: VecDeque<Instant>,
    next: Option<Command>,
}

impl Worker {
    pub(super) fn new(shared: Arc<Shared>, commands: Receiver<Command>) -> Self {
        Self { shared, commands, recent: VecDeque::with_capacity(GUEST_RESETS), next: None }
    }

    pub(super) fn run(mut self) {
        while let Some(command) = self.next.take().or_else(|| self.commands.recv().ok()) {
            match command {
                Command::GuestReset => {
                    if let Err(error) = self.reset(false) {
                        // The guest sees all-ones; the next reset of the machine tries again.
                        tracing::error!(device = self.shared.name(), %error, "Reset asked by the guest failed");
                        continue;
                    }
                    self.slow_down();
                    self.shared.access().end_reset();
                }
                Command::PowerOn(done) => {
                    let result = self.reset(true);
                    if result.is_ok() {
                        self.shared.access().end_reset();
                    }
                    // Nobody waits any more if it took too long.
                    let _ = done.try_send(result);
                }
                Command::Release(hardware) => {
                    // The last reference closes the device, which waits for one more reset in the kernel.
                    drop(hardware);
                    return;
                }
            }
        }
    }

    /// Resets the hardware; the gate stays closed, for the caller to open.
    fn reset(&self, power_on: bool) -> Result<(), ResetError> {
        let shared = &self.shared;
        if shared.access().begin_reset() == Begin::Gone {
            return Err(ResetError::Gone);
        }
        let hardware = shared.access().resetting().ok_or(ResetError::Gone)?;
        for handler in shared.layout().handlers() {
            handler.before_reset();
        }
        // With a window left a vCPU could wait in the kernel for the end of the reset.
        shared.registers().quiesce(hardware.as_ref()).map_err(ResetError::Failed)?;
        reset_hardware(hardware.as_ref()).map_err(ResetError::Failed)?;
        shared.counters().reset();
        shared.registers().reset(power_on);
        for handler in shared.layout().handlers() {
            handler.after_reset();
        }
        Ok(())
    }

    /// Keeps the end of a guest's reset from the guest for as long as it resets too often. A command of the vmm
    /// ends the wait.
    fn slow_down(&mut self) {
        if self.recent.len() >= GUEST_RESETS
            && let Some(oldest) = self.recent.pop_front()
        {
            let wait = (oldest + GUEST_RESET_PERIOD).saturating_duration_since(Instant::now());
            match self.commands.recv_timeout(wait) {
                Ok(command) => self.next = Some(command),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
        }
        self.recent.push_back(Instant::now());
    }
}

fn reset_hardware(hardware: &dyn VfHardware) -> io::Result<()> {
    for _ in 1..TRIES {
        match hardware.reset() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(TRY_AGAIN_AFTER),
            result => return result,
        }
    }
    hardware.reset()
}
