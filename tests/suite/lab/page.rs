// SPDX-License-Identifier: Apache-2.0

//! Pages whose blocks are run as they stand there, `sh host` by the command line and `sh guest` in a guest:
//! `docs/guest-networking.md`, and `docs/first-vm.md`.

use crate::fixture::{Agent, Guest, agent::binary, host};

const PAGE: &str = include_str!("../../../docs/guest-networking.md");
/// The page about the first VM.
pub const FIRST_VM: &str = include_str!("../../../docs/first-vm.md");

/// The blocks with this mark of a section of the page about networks of guests.
pub fn blocks(section: &str, mark: &str) -> Vec<String> {
    blocks_of(PAGE, section, mark)
}

/// The blocks with this mark of a section of a page.
pub fn blocks_of(page: &str, section: &str, mark: &str) -> Vec<String> {
    let (begin, fence) = (format!("## {section}\n"), format!("```{mark}\n"));
    let text = page.split_once(&begin).unwrap_or_else(|| panic!("the page has no section {section}")).1;
    let text = text.split("\n## ").next().unwrap_or_default();
    let blocks =
        text.split(&fence).skip(1).map(|rest| rest.split("```").next().unwrap_or_default().to_owned());
    let blocks: Vec<String> = blocks.collect();
    assert!(!blocks.is_empty(), "section {section} has no block {mark}");
    blocks
}

/// Runs a section's commands of the host.
pub fn follow_on_host(agent: &Agent, section: &str) {
    let socket = agent.directory().join("api.sock");
    let program = format!("{} --socket {}", binary().display(), socket.display());
    for block in blocks(section, "sh host") {
        let script = format!("sudo() {{ \"$@\"; }}\nportcullis() {{ {program} \"$@\"; }}\n{block}");
        host::run("bash", &["-euc", &script]);
    }
}

/// Runs a section's commands of the guest, with words replaced.
pub fn follow_in_guest(guest: &mut Guest<'_>, section: &str, replaced: &[(&str, &str)]) {
    for block in blocks(section, "sh guest") {
        let block = replaced.iter().fold(block, |block, (from, to)| {
            assert!(block.contains(from), "section {section} does not say {from}");
            block.replace(from, to)
        });
        for line in block.lines() {
            guest.must(line);
        }
    }
}
