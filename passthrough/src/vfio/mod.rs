// SPDX-License-Identifier: Apache-2.0

//! Functions behind VFIO: the container of a VM and the devices in it.

mod container;
mod device;
mod error;
#[cfg(test)]
mod lab;
mod window;

pub use container::{Container, KvmVfioDevice};
pub use device::VfioVf;
pub use error::Error;
