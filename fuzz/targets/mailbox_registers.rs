// SPDX-License-Identifier: Apache-2.0

//! The mailbox's registers: any accesses of a guest, and what the relay does meanwhile.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| passthrough::mailbox::fuzz::fuzz_registers(data));
