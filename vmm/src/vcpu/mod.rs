// SPDX-License-Identifier: Apache-2.0

//! vCPU threads: each owns its KVM file descriptor and receives commands over a channel.
//!
//! ```text
//!             Run                 exit that stops it (reset, power-off, failure)
//!   Parked ─────────▶ Running ───────────────────────────────────────▶ Parked
//!     ▲  ◀───────────────│ Park
//!     └── PowerOn, Enter(entry) (registers only)           closed channel: the thread ends
//! ```
//!
//! Only the machine ([`crate::machine`]) moves a vCPU between states. A running vCPU sees a command after a signal
//! has taken it out of the guest. The sender repeats the signal until the vCPU acknowledges: this closes the race
//! between "check for commands" and "enter the guest".

pub mod cpuid;
pub mod exit;
pub mod state;

use std::{
    sync::{
        Arc,
        mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError},
    },
    thread,
    time::{Duration, Instant},
};

use devices::machine::MachineEvent;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::{
    errno,
    eventfd::EventFd,
    signal::{Killable, SIGRTMIN, register_signal_handler},
};

use self::{
    exit::{Counters, Exit, Ports, Step},
    state::{Entry, PowerOn},
};
use crate::{
    placement::{Pinning, PlacementError},
    seccomp::{self, Confinement},
};

/// The longest time to an acknowledgement. Only a bug in KVM could exceed it.
const ACKNOWLEDGE: Duration = Duration::from_secs(10);
/// The interval of repeated signals.
const KICK_AGAIN: Duration = Duration::from_millis(2);

/// Errors of vCPUs.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// An ioctl failed.
    #[error("KVM refused to set up vCPU {0}")]
    Kvm(u8, #[source] kvm_ioctls::Error),
    /// The thread or the signal handler could not be set up.
    #[error("Cannot start the thread of vCPU {0}")]
    Thread(u8, #[source] std::io::Error),
    /// A thread cannot run on its CPUs.
    #[error(transparent)]
    Placement(#[from] PlacementError),
    /// A thread does not acknowledge.
    #[error("vCPU {0} does not answer; this is a bug of Portcullis or KVM")]
    Silent(u8),
}

/// Commands to one vCPU thread.
enum VcpuCommand {
    Run,
    Park,
    /// Enter and leave KVM_RUN once, without an instruction of the guest.
    FirstRun,
    /// Restore the power-on state.
    PowerOn,
    /// Set the boot protocol's registers, from power-on state.
    Enter(Entry),
}

/// An event of the machine's threads for the event loop.
#[derive(Debug)]
pub enum Event {
    /// The guest requests it. The vCPU is parked.
    Machine(MachineEvent),
    /// The vCPU cannot go on. It is parked.
    Broken {
        /// The vCPU's index.
        index: u8,
        /// KVM's reason.
        what: String,
    },
    /// A disk waits for room on the host's file system.
    DiskFull {
        /// The disk's name.
        disk: String,
    },
    /// The growth of a disk has a result ([`Disks::grown`](crate::board::Disks::grown)).
    DiskGrown,
    /// An I/O thread has ended or panicked.
    IoThreadEnded {
        /// The thread's name.
        name: String,
    },
}

/// Sends events to the event loop: a channel and an eventfd that is signalled after each message.
#[derive(Debug)]
pub struct Events {
    sender: Sender<Event>,
    signal: EventFd,
}

impl Events {
    /// Makes both ends: the sender for threads, and the receiver for the event loop (read the eventfd first, then the
    /// channel).
    ///
    /// # Errors
    /// Those of `eventfd`.
    pub fn pair() -> std::io::Result<(Self, Receiver<Event>, EventFd)> {
        let signal = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let (sender, receiver) = mpsc::channel();
        let readable = signal.try_clone()?;
        Ok((Self { sender, signal }, receiver, readable))
    }

    /// Sends an event and wakes the event loop.
    pub(crate) fn send(&self, event: Event) {
        if self.sender.send(event).is_ok() {
            // Fails only if the counter is full: then the loop's wake-up is already pending.
            let _ = self.signal.write(1);
        }
    }
}

/// The machine's end of one vCPU's thread.
struct Handle {
    index: u8,
    commands: Sender<VcpuCommand>,
    acknowledged: Receiver<Result<(), kvm_ioctls::Error>>,
    thread: Option<thread::JoinHandle<()>>,
}

/// All vCPUs of a machine.
pub struct Vcpus(Vec<Handle>);

extern "C" fn leave_guest(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl Vcpus {
    /// Starts the threads, parked, in power-on state. `fds` must not have run, and come with their state. With `pinning`,
    /// each thread runs on the CPUs of its vCPU.
    ///
    /// # Errors
    /// See [`VcpuError`].
    pub(crate) fn start(
        fds: Vec<(VcpuFd, PowerOn)>,
        ports: &Arc<dyn Ports>,
        counters: &Arc<Counters>,
        events: &Arc<Events>,
        first_entry: &Arc<std::sync::OnceLock<Instant>>,
        confinement: &Confinement,
        pinning: Option<&Pinning>,
    ) -> Result<Self, VcpuError> {
        // The handler does nothing: the arrival of the signal takes a vCPU out of KVM_RUN.
        register_signal_handler(SIGRTMIN(), leave_guest)
            .map_err(|e| VcpuError::Thread(0, std::io::Error::from_raw_os_error(e.errno())))?;
        let mut vcpus = Self(Vec::with_capacity(fds.len()));
        for (index, (fd, power_on)) in (0_u8..).zip(fds) {
            let (commands, inbox) = mpsc::channel();
            let (acknowledge, acknowledged) = mpsc::channel();
            let vcpu = Vcpu {
                index,
                fd,
                power_on,
                ports: Arc::clone(ports),
                counters: Arc::clone(counters),
                events: Arc::clone(events),
                first_entry: Arc::clone(first_entry),
            };
            if let Some(pinning) = pinning {
                pinning.for_vcpu(index)?;
            }
            let confine = confinement.prepare(seccomp::Thread::Vcpu);
            let thread = thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || {
                    confine();
                    vcpu.serve(&inbox, &acknowledge);
                })
                .map_err(|e| VcpuError::Thread(index, e))?;
            vcpus.0.push(Handle { index, commands, acknowledged, thread: Some(thread) });
        }
        if let Some(pinning) = pinning {
            pinning.for_others()?;
        }
        Ok(vcpus)
    }

    /// Lets all vCPUs run.
    ///
    /// # Errors
    /// [`VcpuError::Silent`].
    pub fn run(&self) -> Result<(), VcpuError> {
        self.all(|| VcpuCommand::Run)
    }

    /// Stops all vCPUs at an instruction boundary.
    ///
    /// # Errors
    /// [`VcpuError::Silent`].
    pub fn park(&self) -> Result<(), VcpuError> {
        self.all(|| VcpuCommand::Park)
    }

    /// Puts all (parked) vCPUs into power-on state. After it KVM has no registered place in guest memory (clock,
    /// steal time, end of interrupt), and writes to none.
    ///
    /// # Errors
    /// See [`VcpuError`].
    pub fn power_on(&self) -> Result<(), VcpuError> {
        self.all(|| VcpuCommand::PowerOn)
    }

    /// Begins to take each vCPU through KVM_RUN, without an instruction of the guest; [`Self::wait`] ends it.
    ///
    /// # Errors
    /// [`VcpuError::Silent`].
    pub fn begin_first_run(&self) -> Result<(), VcpuError> {
        self.0.iter().try_for_each(|handle| handle.send(VcpuCommand::FirstRun))
    }

    /// Waits until all vCPUs have acknowledged.
    ///
    /// # Errors
    /// See [`VcpuError`].
    pub fn wait(&self) -> Result<(), VcpuError> {
        self.0.iter().try_for_each(Handle::wait)
    }

    /// Puts the boot processor (parked, in power-on state) at `entry`. Does not wait, which saves two wake-ups: the
    /// next command returns an error of KVM.
    ///
    /// # Errors
    /// [`VcpuError::Silent`].
    pub fn enter(&self, entry: Entry) -> Result<(), VcpuError> {
        self.0.first().map_or(Ok(()), |first| first.send(VcpuCommand::Enter(entry)))
    }

    fn all(&self, command: impl Fn() -> VcpuCommand) -> Result<(), VcpuError> {
        for handle in &self.0 {
            let command = command();
            // Only parking finds a vCPU in the guest.
            let running = matches!(command, VcpuCommand::Park);
            handle.send(command)?;
            if running {
                handle.kick();
            }
        }
        self.wait()
    }
}

impl Vcpus {
    /// Ends the threads. Does nothing the second time.
    pub fn end(&mut self) {
        for handle in &mut self.0 {
            // Closing the channel ends the thread at its next check.
            let (closed, _) = mpsc::channel();
            handle.commands = closed;
        }
        for handle in &mut self.0 {
            let deadline = Instant::now() + ACKNOWLEDGE;
            while handle.thread.as_ref().is_some_and(|thread| !thread.is_finished())
                && Instant::now() < deadline
            {
                handle.kick();
                thread::sleep(Duration::from_micros(200));
            }
            if let Some(thread) = handle.thread.take()
                && thread.is_finished()
            {
                let _ = thread.join();
            }
        }
        self.0.clear();
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.end();
    }
}

impl Handle {
    fn send(&self, command: VcpuCommand) -> Result<(), VcpuError> {
        self.commands.send(command).map_err(|_| VcpuError::Silent(self.index))
    }

    fn kick(&self) {
        if let Some(thread) = &self.thread {
            // Fails only for a thread that has ended, which needs no kick.
            let _ = thread.kill(SIGRTMIN());
        }
    }

    fn wait(&self) -> Result<(), VcpuError> {
        let deadline = Instant::now() + ACKNOWLEDGE;
        while Instant::now() < deadline {
            match self.acknowledged.recv_timeout(KICK_AGAIN) {
                Ok(result) => return result.map_err(|e| VcpuError::Kvm(self.index, e)),
                Err(RecvTimeoutError::Timeout) => self.kick(),
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        Err(VcpuError::Silent(self.index))
    }
}

/// The state of the vCPU's own thread.
struct Vcpu {
    index: u8,
    fd: VcpuFd,
    power_on: PowerOn,
    ports: Arc<dyn Ports>,
    counters: Arc<Counters>,
    events: Arc<Events>,
    first_entry: Arc<std::sync::OnceLock<Instant>>,
}

impl Vcpu {
    fn serve(
        mut self,
        commands: &Receiver<VcpuCommand>,
        acknowledge: &Sender<Result<(), kvm_ioctls::Error>>,
    ) {
        let mut running = false;
        let mut refused = None;
        loop {
            let command = if running {
                match commands.try_recv() {
                    Ok(command) => Some(command),
                    Err(TryRecvError::Empty) => None,
                    Err(TryRecvError::Disconnected) => return,
                }
            } else {
                match commands.recv() {
                    Ok(command) => Some(command),
                    Err(_) => return,
                }
            };
            if let Some(command) = command {
                let result = match (command, refused.take()) {
                    (VcpuCommand::Enter(entry), _) => {
                        refused = state::enter(&self.fd, entry).err();
                        continue;
                    }
                    (_, Some(error)) => Err(error),
                    (VcpuCommand::Run, None) => {
                        running = true;
                        #[cfg(feature = "attacks")]
                        crate::attack::strike("vcpu");
                        self.first_entry.get_or_init(Instant::now);
                        Ok(())
                    }
                    (VcpuCommand::Park, None) => {
                        running = false;
                        // Keeps the guest's watchdogs from counting the pause. Fails in a guest without kvmclock,
                        // which has none.
                        let _ = self.fd.kvmclock_ctrl();
                        Ok(())
                    }
                    (VcpuCommand::FirstRun, None) => {
                        self.complete_access();
                        Ok(())
                    }
                    (VcpuCommand::PowerOn, None) => {
                        self.complete_access();
                        self.power_on.restore(&self.fd)
                    }
                };
                if acknowledge.send(result).is_err() {
                    return;
                }
            }
            if running {
                match self.step() {
                    Step::Continue => {}
                    Step::Event(event) => {
                        running = false;
                        self.events.send(Event::Machine(event));
                    }
                    Step::Broken(what) => {
                        running = false;
                        self.events.send(Event::Broken { index: self.index, what });
                    }
                }
            }
        }
    }

    /// Completes a port or MMIO access of the guest, which KVM would otherwise complete into new registers. Runs
    /// nothing.
    fn complete_access(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
        let _ = self.fd.run();
        self.fd.set_kvm_immediate_exit(0);
    }

    /// The bytes of one access of the port exit in progress: kvm-ioctls returns only all bytes of a string
    /// instruction.
    fn port_width(&mut self) -> usize {
        // SAFETY: a plain number in every variant of the union, filled in by the kernel for this exit.
        let io = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io };
        io.size.into()
    }

    fn step(&mut self) -> Step {
        let exit = match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                let data = std::ptr::from_mut(data);
                let width = self.port_width();
                // SAFETY: it lies in the page that KVM shares, behind `kvm_run`, as long as the vCPU's descriptor is
                // open; the borrow of the descriptor that it came from has ended, and nothing else refers to these
                // bytes.
                Exit::PortRead { port, width, data: unsafe { &mut *data } }
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                let data = std::ptr::from_ref(data);
                let width = self.port_width();
                // SAFETY: as above.
                Exit::PortWrite { port, width, data: unsafe { &*data } }
            }
            Ok(VcpuExit::MmioRead(gpa, data)) => Exit::MmioRead(gpa, data),
            Ok(VcpuExit::MmioWrite(gpa, data)) => Exit::MmioWrite(gpa, data),
            Ok(VcpuExit::Shutdown) => Exit::Shutdown,
            Ok(VcpuExit::SystemEvent(kind, _)) => Exit::SystemEvent(kind),
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => Exit::Interrupted,
            Ok(VcpuExit::InternalError) => Exit::Broken(
                "KVM cannot emulate an instruction of the guest (KVM_EXIT_INTERNAL_ERROR)".to_owned(),
            ),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                Exit::Broken(format!("The processor refuses to enter the guest (reason {reason:#x})"))
            }
            Ok(other) => Exit::Broken(format!("KVM left the guest for an unknown reason: {other:?}")),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Exit::Interrupted,
            Err(error) => Exit::Broken(format!("KVM_RUN failed: {}", errno::Error::new(error.errno()))),
        };
        exit::handle(exit, self.ports.as_ref(), &self.counters)
    }
}
