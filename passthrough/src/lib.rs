// SPDX-License-Identifier: Apache-2.0

//! Assigned PCI functions and the control path of virtual functions.
//!
//! In the vmm: [`hardware`] is the seam to VFIO ([`vfio`]) or the simulator, [`function`] the PCI function that the
//! guest sees, [`channel`] the trapped registers of VF drivers, [`family`] their messages, [`relay`] the thread between them and the
//! agent's verdicts. The agent scrubs a VF between two tenants by the same mailbox code.

pub mod channel;
pub mod family;
pub mod function;
pub mod hardware;
pub mod relay;
pub mod threads;
mod token_bucket;
pub mod vfio;
