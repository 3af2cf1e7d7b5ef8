// SPDX-License-Identifier: Apache-2.0

//! Assigned PCI functions and the control path of virtual functions.
//!
//! In the vmm: [`hardware`] is the seam to VFIO ([`vfio`]) or the simulator, [`function`] the PCI function that the
//! guest sees, [`channel`] the trapped registers of VF drivers, [`family`] their messages, [`relay`] the thread between them and the
//! agent's verdicts. In a process of its own: [`sim`], the simulated adapter's PF. The
//! crate [`sriov`] finds PFs and VFs for the agent, binds them and programs the PF.

pub mod channel;
pub mod family;
pub mod function;
pub mod hardware;
pub mod relay;
pub mod sim;
pub mod threads;
pub mod vfio;
