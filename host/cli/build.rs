// SPDX-License-Identifier: Apache-2.0

//! Builds the small guest (`resources/guest`) with the C compiler that the bundled SQLite needs anyway.

use std::{
    env,
    error::Error,
    path::{Path, PathBuf},
    process::Command,
};

/// Freestanding, without the instructions that KVM's emulator does not know: no vectors, no x87.
const FLAGS: [&str; 20] = [
    "-std=gnu11",
    "-Os",
    "-m64",
    "-march=x86-64",
    "-Wall",
    "-Wextra",
    "-ffreestanding",
    "-mgeneral-regs-only",
    "-mno-red-zone",
    "-mcmodel=small",
    "-fno-pic",
    "-fno-pie",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fno-strict-aliasing",
    "-fcf-protection=none",
    "-nostdlib",
    "-static",
    "-no-pie",
    "-s",
];

const CURE: &str = "install GCC (Debian's package gcc), or name a compiler by CC";

fn main() -> Result<(), Box<dyn Error>> {
    let root = Path::new(&env::var("CARGO_MANIFEST_DIR")?).join("../../resources/guest");
    let image = PathBuf::from(env::var("OUT_DIR")?).join("small-guest.elf");
    // The directory too, because a file may be added.
    println!("cargo::rerun-if-changed={}", root.display());
    let mut sources = Vec::new();
    for entry in root.read_dir()? {
        let path = entry?.path();
        println!("cargo::rerun-if-changed={}", path.display());
        if path.extension().is_some_and(|extension| extension == "c" || extension == "S") {
            sources.push(path);
        }
    }
    sources.sort();
    let compiler = compiler()?;
    // Without CFLAGS: they are for programs of this machine, and could ask for instructions that the guest must not have.
    let mut command = Command::new(&compiler);
    command.args(FLAGS).arg(format!("-Wl,-T,{}", root.join("guest.ld").display()));
    command.args(["-Wl,-n", "-Wl,--build-id=none", "-Wl,-z,noexecstack", "-o"]).arg(&image).args(&sources);
    let output = command.output().map_err(|error| {
        format!("The C compiler {} cannot be started ({error}); {CURE}", compiler.display())
    })?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        let compiler = compiler.display();
        return Err(format!("{compiler} cannot build the small guest ({}):\n{said}", output.status).into());
    }
    // A guest without a loader of its own needs a segment that is readable, writable and executable.
    for line in said.lines().filter(|line| line.contains("warning:") && !line.contains("RWX")) {
        println!("cargo::warning={line}");
    }
    Ok(())
}

fn compiler() -> Result<PathBuf, String> {
    match cc::Build::new().no_default_flags(true).opt_level(0).try_get_compiler() {
        Ok(compiler) => Ok(compiler.path().to_owned()),
        Err(error) => Err(format!("The small guest needs a C compiler ({error}); {CURE}")),
    }
}
