// SPDX-License-Identifier: Apache-2.0

//! `portcullis`: agent, per-VM process, simulated PF and command line in one binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    // The per-VM process first: its start time and memory are a goal, so it touches neither parser nor runtime.
    let mut arguments = std::env::args_os().skip(1);
    let first = arguments.next();
    let is = |subcommand| first.as_ref().is_some_and(|first| first == subcommand);
    let process = if is(vmm::process::SUBCOMMAND) {
        Some(vmm::process::main as fn(&[String]) -> ExitCode)
    } else if is(host::sim::process::SUBCOMMAND) {
        Some(host::sim::process::main as fn(&[String]) -> ExitCode)
    } else {
        None
    };
    if let Some(process) = process {
        // An argument that is not UTF-8 is no descriptor and no id either: the process itself refuses it.
        let arguments: Vec<String> =
            arguments.map(|argument| argument.to_string_lossy().into_owned()).collect();
        // Into the process's log file, which the agent bounds.
        let log = tracing_subscriber::fmt().with_ansi(false).with_target(false).with_writer(std::io::stderr);
        // Without the lines of crates that use `log`: virtio-queue writes one for each mistake of a guest's driver.
        let _ = tracing::subscriber::set_global_default(log.finish());
        return process(&arguments);
    }
    host::command_line::run(host::command_line::parse())
}
