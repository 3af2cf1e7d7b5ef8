// SPDX-License-Identifier: Apache-2.0

//! Tests of the switch's policy through its public interface.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

mod capabilities;
mod decisions;
mod fixture;
mod inheritance;
mod many_ports;
mod properties;
mod scale;
mod sharing;
mod tables;
mod values;
mod verdicts;
