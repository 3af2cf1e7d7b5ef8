// SPDX-License-Identifier: Apache-2.0

//! The simulated adapter: an 82576 with VFs for machines that have no SR-IOV hardware.
//!
//! ```text
//!   vmm                                        sim-pf process (unprivileged)            agent
//!   relay ─▶ SimVf (registers, queues, MSI-X)    serve ── SimPfState                     SimPf: PfControl
//!              │ its thread: DMA, frames           │ mailbox as igb, filters, switch        │
//!              └── SOCK_SEQPACKET, one per VF ─────┘◀────── SOCK_SEQPACKET, control ────────┘
//!                                                  └─ tap (optional uplink)
//! ```
//!
//! The PF process trusts only the agent. Input from a VF is a packet of bounded length that is parsed once (`wire`),
//! and a VF that does not read loses only its own frames. The process outlives the agent. It makes a VF's connection
//! ([`control::SimPf::attach`]), which the vmm gets as a file descriptor.
//!
//! A vmm has VFs only. The rest is behind the feature `pf`.

#[cfg(feature = "pf")]
mod address;
#[cfg(feature = "pf")]
pub mod control;
#[cfg(all(feature = "pf", any(test, feature = "test-support")))]
pub mod fuzz;
#[cfg(feature = "pf")]
mod options;
#[cfg(feature = "pf")]
pub mod pf;
#[cfg(test)]
#[cfg(feature = "pf")]
mod tests;
pub mod vf;
mod wire;

#[cfg(feature = "pf")]
pub use address::{MAX_PFS, MAX_VFS, is_simulated, numbers, pf_bdf, vf_bdf};
#[cfg(feature = "pf")]
pub use control::SimPf;
#[cfg(feature = "pf")]
pub use options::{InvalidOption, SimPfOption};
#[cfg(feature = "pf")]
pub use pf::SimPfState;
pub use vf::SimVf;
pub use wire::Frame;
