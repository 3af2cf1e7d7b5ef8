// SPDX-License-Identifier: Apache-2.0

//! Tests that need /dev/kvm and no adapter: VFs are simulated.

mod adapter;
mod bonded;
mod boot_disk;
mod cli;
mod cloud_init;
mod crash;
mod demo;
mod disk_cache;
mod disk_growth;
mod disk_images;
mod disk_room;
mod disks;
mod ephemeral;
mod errors;
mod exit;
mod flood;
mod hostile;
mod lease;
mod life;
mod load;
mod machine;
mod network;
mod nics;
mod nics_of_groups;
mod observe;
mod page;
mod placement;
mod progress;
mod rest;
mod rights;
mod sandbox;
mod simulated_pf;
mod start;
mod text;
mod wakes;
