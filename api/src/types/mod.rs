// SPDX-License-Identifier: Apache-2.0

//! Wire types: the JSON of the API.
//!
//! Every object that users make or configure has an immutable `id`, a `name`, a `revision` (one more for each change
//! of its specification; the ETag), the time when it was `created`, a `spec` (the requested state) and a `status`
//! (the actual state).

mod cause;
mod cloud_init;
mod cpu_list;
mod credential;
mod disk;
mod disk_limits;
mod event;
mod host;
mod initramfs;
mod life;
mod nic;
mod object;
mod operation;
mod page;
mod placement;
mod policy;
mod ranges;
pub(crate) mod schema;
mod secret;
mod stats;
mod values;
mod vm;
mod wanted_port;

pub use cloud_init::*;
pub use cpu_list::*;
pub use credential::*;
pub use disk::*;
pub use disk_limits::*;
pub use event::*;
pub use host::*;
pub use initramfs::*;
pub use life::*;
pub use nic::*;
pub use object::*;
pub use operation::*;
pub use page::*;
pub use placement::*;
pub use policy::*;
pub use secret::*;
pub use stats::*;
pub use values::*;
pub use vm::*;
pub use wanted_port::*;
