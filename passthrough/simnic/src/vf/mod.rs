// SPDX-License-Identifier: Apache-2.0

//! A simulated 82576 VF: the registers and queues that igbvf drives, over a connection to its PF.
//!
//! vCPU threads take only the registers' lock, for the duration of one access. DMA and sockets belong to the VF's
//! thread (`worker`), which holds the DMA lock while it accesses guest memory. A function reset takes that lock too,
//! so that no DMA follows it. Lock order: DMA, configuration space, registers.
//!
//! Features that igbvf does not use are missing: legacy descriptors, the second queue, receive side scaling,
//! moderation (EITR is stored without effect), receive checksums (frames are marked as not checked).

mod config;
mod descriptor;
mod frames;
#[cfg(any(test, feature = "test-support"))]
mod fuzz;
mod interrupts;
mod mailbox;
mod offload;
mod queue;
mod receive;
mod registers;
mod transmit;
mod worker;

use std::{
    io,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
};

use devices::memory::HostMemory;
use passthrough::{
    hardware::{BarInfo, IrqKind, VfHardware},
    threads::{ThreadKind, ThreadStart},
};
use rustix::event::{EventfdFlags, eventfd};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

#[cfg(any(test, feature = "test-support"))]
pub use self::fuzz::fuzz_transmit;
use self::{config::ConfigSpace, registers::Registers, worker::Worker};
pub use self::{config::IDS, frames::FramePort};

/// Size of both BARs, as on an 82576.
const BAR_SIZE: u32 = 0x4000;
const REGISTERS_BAR: usize = 0;
const MSIX_BAR: u32 = 3;
const MSIX_PENDING: u32 = 0x2000;
const VECTORS: u16 = 3;

/// A simulated VF.
pub struct SimVf {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    memory: GuestMemoryMmap,
    registers: Mutex<Registers>,
    config: Mutex<ConfigSpace>,
    /// Held during accesses to guest memory.
    dma: Mutex<()>,
    /// An eventfd, known only to this module and the thread.
    wake: OwnedFd,
    /// Signalled once the PF is gone.
    failed: EventFd,
    /// The frames of a VF without queues in guest memory.
    frames: Option<frames::Inbox>,
    stopped: AtomicBool,
    /// The PF has ended the connection.
    gone: AtomicBool,
    /// Failed accesses to guest memory: rings and buffers that the guest put elsewhere.
    dma_errors: AtomicU64,
}

impl Shared {
    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn dma(&self) -> MutexGuard<'_, ()> {
        self.dma.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count_dma_error(&self) {
        self.dma_errors.fetch_add(1, Ordering::Relaxed);
    }

    fn set_link(&self, up: bool) {
        self.registers().link_up = up;
        if let Some(inbox) = &self.frames {
            inbox.link_changed();
        }
    }

    fn wake(&self) {
        // It fails only after 2^64 writes without a read by the thread.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl SimVf {
    /// Puts a VF at its PF's end of `connection` ([`SimPf::attach`](super::SimPf::attach)), with DMA into all of
    /// `memory`. Starts its thread with `threads`.
    ///
    /// # Errors
    /// Those of `fcntl`, of making eventfds and of starting a thread.
    pub fn new(connection: OwnedFd, memory: GuestMemoryMmap, threads: &ThreadStart) -> io::Result<Self> {
        Self::start(connection, memory, None, threads).map(|(vf, _)| vf)
    }

    /// Puts a VF without queues in guest memory at its PF's end of `connection`. Its owner takes and sends the frames by the
    /// port. Starts its thread with `threads`.
    ///
    /// # Errors
    /// As [`SimVf::new`].
    pub fn with_port(connection: OwnedFd, threads: &ThreadStart) -> io::Result<(Self, FramePort)> {
        let inbox = frames::Inbox::new()?;
        let (vf, connection) = Self::start(connection, GuestMemoryMmap::new(), Some(inbox), threads)?;
        let port = FramePort::new(Arc::clone(&vf.shared), connection);
        Ok((vf, port))
    }

    fn start(
        connection: OwnedFd,
        memory: GuestMemoryMmap,
        frames: Option<frames::Inbox>,
        threads: &ThreadStart,
    ) -> io::Result<(Self, Arc<OwnedFd>)> {
        rustix::io::ioctl_fionbio(&connection, true)?;
        let connection = Arc::new(connection);
        let shared = Arc::new(Shared {
            memory,
            registers: Mutex::default(),
            config: Mutex::new(ConfigSpace::new()),
            dma: Mutex::new(()),
            wake: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            failed: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            frames,
            stopped: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            dma_errors: AtomicU64::new(0),
        });
        let worker = Worker::new(shared.clone(), Arc::clone(&connection));
        let thread = threads.spawn(ThreadKind::SimulatedVf, "sim-vf".into(), move || worker.run())?;
        Ok((Self { shared, thread: Mutex::new(Some(thread)) }, connection))
    }

    /// A VF without memory, for code that only sends mailbox messages.
    ///
    /// # Errors
    /// As [`SimVf::new`].
    pub fn without_memory(connection: OwnedFd) -> io::Result<Self> {
        Self::new(connection, GuestMemoryMmap::new(), &ThreadStart::default())
    }

    /// An eventfd that is signalled once the PF has ended the connection or its process is gone. The VF then stays as
    /// one without a link.
    ///
    /// # Errors
    /// Those of duplicating a file descriptor.
    pub fn error_event(&self) -> io::Result<EventFd> {
        self.shared.failed.try_clone()
    }

    /// Failed accesses of the device to guest memory, since the start.
    #[must_use]
    pub fn dma_errors(&self) -> u64 {
        self.shared.dma_errors.load(Ordering::Relaxed)
    }
}

impl Drop for SimVf {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Release);
        self.shared.wake();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("The thread of a simulated VF had panicked");
        }
    }
}

/// Registers are 32 bits wide and aligned.
fn register(index: usize, offset: u64, len: usize) -> Option<u16> {
    let known = index == REGISTERS_BAR && len == 4 && offset.is_multiple_of(4) && offset < BAR_SIZE.into();
    if known { u16::try_from(offset).ok() } else { None }
}

impl VfHardware for SimVf {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.shared.config().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let flr = self.shared.config().write(offset, data);
        if flr {
            self.shared.function_reset();
        } else {
            // The write may have allowed access to memory.
            self.shared.wake();
        }
    }

    fn bar(&self, index: usize) -> BarInfo {
        let exists = index == REGISTERS_BAR || index == MSIX_BAR as usize;
        BarInfo { size: if exists { BAR_SIZE.into() } else { 0 }, ..BarInfo::default() }
    }

    fn bar_read(&self, index: usize, offset: u64, data: &mut [u8]) {
        let inside = offset.saturating_add(data.len() as u64) <= self.bar(index).size;
        data.fill(if inside { 0 } else { 0xff });
        if let Some(register) = register(index, offset, data.len()) {
            let value = self.shared.registers().read(register);
            data.copy_from_slice(&value.to_le_bytes());
        }
    }

    fn bar_write(&self, index: usize, offset: u64, data: &[u8]) {
        if let (Some(register), Ok(value)) = (register(index, offset, data.len()), data.try_into()) {
            let wake = self.shared.registers().write(register, u32::from_le_bytes(value));
            if wake {
                self.shared.wake();
            }
        }
    }

    fn map_bar(&self, _index: usize, _offset: u64, _len: u64) -> io::Result<Arc<dyn HostMemory>> {
        // Every access has an effect, so nothing of it is memory.
        Err(io::ErrorKind::Unsupported.into())
    }

    fn irq_count(&self, kind: IrqKind) -> u32 {
        match kind {
            IrqKind::Msi => 0,
            IrqKind::Msix => VECTORS.into(),
        }
    }

    fn enable_irqs(&self, kind: IrqKind, triggers: &[EventFd]) -> io::Result<()> {
        if kind != IrqKind::Msix || triggers.len() > VECTORS.into() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let triggers = triggers.iter().map(EventFd::try_clone).collect::<io::Result<_>>()?;
        self.shared.registers().interrupts.connect(triggers);
        Ok(())
    }

    fn disable_irqs(&self, kind: IrqKind) -> io::Result<()> {
        if kind == IrqKind::Msix {
            self.shared.registers().interrupts.connect(Vec::new());
        }
        Ok(())
    }

    /// Waits for the DMA of at most one frame.
    fn reset(&self) -> io::Result<()> {
        self.shared.function_reset();
        Ok(())
    }
}

impl Shared {
    fn function_reset(&self) {
        let dma = self.dma();
        *self.config() = ConfigSpace::new();
        self.registers().function_reset();
        drop(dma);
        self.wake();
    }
}
