// SPDX-License-Identifier: Apache-2.0

//! What a guest can have the simulated VF send: descriptors and the packet that they are about.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    passthrough::sim::fuzz::fuzz_transmit(data);
});
