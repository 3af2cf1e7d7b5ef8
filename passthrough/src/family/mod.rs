// SPDX-License-Identifier: Apache-2.0

//! Families of VFs: each is a folder here.

pub mod address;
pub mod igb;
