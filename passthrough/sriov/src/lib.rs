// SPDX-License-Identifier: Apache-2.0

//! The host side: inventory of PFs and VFs, driver binding, PF control. Only the agent uses it. At
//! the points of [`failpoints`] tests kill the agent.
//!
//! Everything here is synchronous and may wait for the kernel (the rtnl lock, a driver's probe): call it on threads
//! that may block, never on a thread that serves a guest.
//!
//! The agent takes a VF in this order, and stores each value before the next step changes the state that it describes:
//!
//! 1. [`Sysfs::check_viable`], [`Sysfs::current_binding`], [`PfControl::read`];
//! 2. [`Sysfs::bind_vfio`], [`Sysfs::reset`], and [`PfControl::read`] again for [`VfSettings::without_own_mac`];
//! 3. [`PfControl::apply`] for the guest's address and policy.
//!
//! The agent returns the VF, once no process has it open, by [`Sysfs::reset`], [`restore`] and [`Sysfs::restore`]. Each
//! step may be repeated after a crash.

mod bdf;
mod binding;
mod control;
#[cfg(any(test, feature = "test-support"))]
pub mod fake;
mod group;
mod inventory;
mod netlink;
mod sysfs;
mod usage;
mod vf_count;

#[cfg(test)]
mod tests;

pub use bdf::{Bdf, InvalidBdf};
pub use binding::{BindError, PreviousBinding, VFIO_PCI};
pub use control::{
    ApplyError, PfControl, PfError, PortVlan, TagProtocol, VfChange, VfLink, VfSettings, restore,
};
pub use group::{GroupMember, InterruptRemapping, IommuGroup, ViabilityError};
pub use inventory::{Interface, InventoryError, PciDevice, Pf, Vf};
pub use netlink::{FlowControl, Hint, Monitor, NetlinkPf, flow_control};
pub use sysfs::{AttributeWriter, KernelWriter, Sysfs, SysfsError};
pub use usage::Usage;
pub use vf_count::VfCountError;
