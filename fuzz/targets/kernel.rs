// SPDX-License-Identifier: Apache-2.0

//! Kernel images: headers of bzImage and ELF.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm::boot::fuzz::fuzz_kernel(data));
