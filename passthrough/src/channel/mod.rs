// SPDX-License-Identifier: Apache-2.0

//! Channels: the ways in which a VF's driver talks to the PF's driver. Each kind of channel is a module here.

pub mod mailbox;
