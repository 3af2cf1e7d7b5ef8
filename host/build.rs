// SPDX-License-Identifier: Apache-2.0

//! Options of the linker for the program.

fn main() {
    // A vmm is this program, too, and begins with its relocations: packed ones take a 20th of the pages. glibc has them
    // since 2.36, Debian 12's.
    println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    println!("cargo:rerun-if-changed=build.rs");
}
