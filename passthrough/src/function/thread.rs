// SPDX-License-Identifier: Apache-2.0

//! The function's own thread, which does the work that may block.

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

/// Guest resets that are carried out at once within a period. Later ones end no earlier than the period allows: a
/// reset of a VF costs the host work (its PF driver rewrites filters), so a guest that resets in a loop is slowed
/// down.
const GUEST_RESETS: usize = 8;
const GUEST_RESET_PERIOD: Duration = Duration::from_secs(4);

/// Attempts at a reset, which the kernel refuses while another process holds the device's lock.
const TRIES: u32 = 10;
const TRY_AGAIN_AFTER: Duration = Duration::from_millis(50);

pub(super) enum Command {
    /// The guest requested a reset; the access is already closed for it.
    GuestReset,
    /// The guest has changed its interrupts, more often than is made at once.
    FollowIrqs,
    /// Reset to the state at power-on, and send the result.
    PowerOn(SyncSender<Result<(), ResetError>>),
    /// The function was closed: release the hardware, and end.
    Release(Option<Arc<dyn VfHardware>>),
}

/// The queue is unbounded but short: a guest has one reset and one change of interrupts at a time, and the vmm sends the other commands.
pub(super) type Commands = Sender<Command>;

pub(super) struct Worker {
    shared: Arc<Shared>,
    commands: Receiver<Command>,
    /// End times of the last guest resets.
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
                        // The guest sees all-ones. The next reset of the machine tries again.
                        tracing::error!(device = self.shared.name(), %error, "A reset by the guest failed");
                        continue;
                    }
                    self.slow_down();
                    self.shared.access().end_reset();
                }
                Command::FollowIrqs => self.follow_irqs(),
                Command::PowerOn(done) => {
                    let result = self.reset(true);
                    if result.is_ok() {
                        self.shared.access().end_reset();
                    }
                    // The receiver is gone if the reset took too long.
                    let _ = done.try_send(result);
                }
                Command::Release(hardware) => {
                    // Dropping the last reference closes the device, which waits for one more reset in the kernel.
                    drop(hardware);
                    return;
                }
            }
        }
    }

    /// Makes the guest's last change of interrupts when their rate allows it. A command ends the wait: each resets the function,
    /// which turns its interrupts off, or closes it.
    fn follow_irqs(&mut self) {
        loop {
            let due = self.shared.registers().irqs_due();
            let Some(wait) = due else { return };
            if wait.is_zero() {
                let shared = &self.shared;
                shared.access().with(|hardware| shared.registers().follow_late(hardware));
                return;
            }
            match self.commands.recv_timeout(wait) {
                Ok(Command::FollowIrqs) | Err(RecvTimeoutError::Timeout) => {}
                Ok(command) => {
                    self.next = Some(command);
                    return;
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Resets the hardware. The access stays closed; the caller opens it.
    fn reset(&self, power_on: bool) -> Result<(), ResetError> {
        let shared = &self.shared;
        if shared.access().begin_reset() == Begin::Gone {
            return Err(ResetError::Gone);
        }
        let hardware = shared.access().resetting().ok_or(ResetError::Gone)?;
        for handler in shared.layout().handlers() {
            handler.before_reset();
        }
        // With a window left, a vCPU could wait in the kernel for the end of the reset.
        shared.registers().quiesce(hardware.as_ref()).map_err(ResetError::Failed)?;
        reset_hardware(hardware.as_ref()).map_err(ResetError::Failed)?;
        shared.counters().reset();
        shared.registers().reset(power_on);
        for handler in shared.layout().handlers() {
            handler.after_reset();
        }
        Ok(())
    }

    /// Delays the end of the reset for a guest that resets too often. A command of the vmm ends the delay.
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
