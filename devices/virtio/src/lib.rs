// SPDX-License-Identifier: Apache-2.0

//! Virtio devices (Virtual I/O Device 1.2, called "the specification" here).
//!
//! ```text
//!  vCPU threads                                     I/O thread of the device
//!  ────────────                                     ────────────────────────
//!  PCI accesses ─▶ transport ─▶ negotiation         worker ─▶ engine (block, net, entropy)
//!                     │   start, stop: a slot          ▲          │
//!                     └────────────────────────────────┤          ▼
//!  doorbell of a queue ── ioeventfd ───────────────────┘        queues in guest memory
//!  interrupt ◀─ irqfd ◀─ eventfd of an MSI-X vector ◀─────────────┘
//! ```
//!
//! The [`transport`] owns the registers. The worker owns the rings, from the moment at which the driver
//! sets DRIVER_OK to the reset. Both share a few atomics and one slot for a command.
//!
//! A device is an [`Engine`](engine::Engine): it serves the requests of its queues, on its own I/O
//! thread, and knows neither PCI nor rings. A new device is a file with an engine.
//!
//! The guest writes all of the rings and may change them at any time. So each value is read once,
//! and checked after the read ([`queue`]).

pub mod block;
pub mod disk;
pub mod engine;
pub mod entropy;
#[cfg(any(test, feature = "test-support"))]
pub mod fuzz;
pub mod limit;
pub mod negotiation;
pub mod net;
pub mod queue;
#[cfg(any(test, feature = "test-support"))]
pub(crate) mod testing;
pub mod transport;
mod worker;

/// Guest memory.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
