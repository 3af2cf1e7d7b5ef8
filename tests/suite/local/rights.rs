// SPDX-License-Identifier: Apache-2.0

//! Two callers in one story: a user of the API's socket names a file that root alone may read, and root does everyday work on
//! that VM.

use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use api::types::{CauseCode, VmAction, VmState};
use serde_json::{Value, json};

use crate::fixture::{Agent, Options, SmallGuest, agent::binary};

/// A user without privileges: `nobody`.
const USER: &str = "65534";

const SECRET: &str = "for-root-alone-fca109eb048c9803";

fn open(path: &Path, mode: u32) {
    fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
}

/// An agent with two users.
struct Site {
    agent: Agent,
    program: PathBuf,
    secret: PathBuf,
}

impl Site {
    fn start() -> Self {
        assert!(rustix::process::geteuid().is_root(), "two users are needed: run it as root");
        let arguments = ["--socket-mode", "0666"].map(Into::into).into();
        let agent = Agent::start_with(Options { arguments, ..Options::default() });
        let (program, secret) = (agent.directory().join("portcullis"), agent.directory().join("secret"));
        open(agent.directory(), 0o755);
        fs::copy(binary(), &program).unwrap();
        open(&program, 0o755);
        // The small guest is a kernel, so this file could be any part of `boot`.
        SmallGuest::spec(&agent, "unused", json!([]), "");
        let mut content = fs::read(agent.directory().join("images/small-guest")).unwrap();
        content.extend_from_slice(SECRET.as_bytes());
        fs::write(&secret, content).unwrap();
        open(&secret, 0o600);
        Self { agent, program, secret }
    }

    /// A command of root's, or of the user.
    fn run(&self, root: bool, line: &str, text: &str) -> Output {
        let mut command = Command::new(if root { self.program.as_os_str() } else { "setpriv".as_ref() });
        if !root {
            command.args(["--reuid", USER, "--regid", USER, "--clear-groups"]).arg(&self.program);
        }
        command.arg("--socket").arg(self.agent.directory().join("api.sock")).args(line.split_whitespace());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // A command that takes no input may have ended.
        let _ = child.stdin.take().unwrap().write_all(text.as_bytes());
        child.wait_with_output().unwrap()
    }

    #[track_caller]
    fn succeeds(&self, root: bool, line: &str, text: &str) {
        let output = self.run(root, line, text);
        assert!(output.status.success(), "{line}: {output:?}");
    }

    /// Asserts that the boot is refused for lack of the user's rights, and that the VM has no process.
    #[track_caller]
    fn refused(&self, root: bool, line: &str, vm: &str, part: &str) {
        let output = self.run(root, line, "");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && text.contains(&format!("{part}_unreadable")),
            "{line}: {output:?}"
        );
        assert!(text.contains(&format!("uid {USER}")), "{line} says whose rights: {text}");
        self.is_at_rest(vm);
    }

    #[track_caller]
    fn is_at_rest(&self, vm: &str) {
        let status = self.agent.vm(vm).status;
        assert!(status.state.is_at_rest() && status.pid.is_none(), "{vm}: {status:?}");
    }

    /// A specification of the VM `name` with the file as a `part` of `boot`.
    fn spec(&self, name: &str, part: &str) -> Value {
        let mut spec = json!({ "name": name, "memory": "2MiB", "boot": { "kernel": "small-guest" } });
        spec["boot"][part] = self.secret.to_str().unwrap().into();
        spec
    }

    /// Asserts that no VM's console has a byte of it.
    fn assert_kept(&self) {
        for vm in self.agent.ask(self.agent.client.list_vms()).unwrap() {
            let output = self.run(true, &format!("console {}", vm.name), "");
            assert!(!String::from_utf8_lossy(&output.stdout).contains(SECRET), "{}", vm.name);
        }
    }
}

/// Root's commands on the VM `{vm}`, and the VM that is booted then. Files are specifications on standard input.
const VERBS: [(&str, &[&str], &str); 9] = [
    ("boot", &[], "{vm}"),
    ("size", &["vm patch {vm} --cpus 2"], "{vm}"),
    ("again", &["vm set {vm} --file -"], "{vm}"),
    ("applied", &["apply -f {file}"], "{vm}"),
    ("renamed", &["vm rename {vm} {vm}-new"], "{vm}-new"),
    ("copied", &["vm clone {vm} {vm}-copy"], "{vm}-copy"),
    ("copied-twice", &["vm clone {vm} {vm}-one", "vm clone {vm}-one {vm}-copy"], "{vm}-copy"),
    ("autostart", &["vm patch {vm} --autostart true"], "{vm}"),
    ("restart", &["vm patch {vm} --restart always --autostart true"], "{vm}"),
];

#[test]
fn whatever_root_does_a_file_is_opened_with_its_authors_rights() {
    let mut site = Site::start();
    let mut unasked = Vec::new();
    for part in ["kernel", "initramfs"] {
        for (verb, lines, booted) in VERBS {
            let vm = format!("{part}-{verb}");
            let spec = site.spec(&vm, part);
            site.succeeds(false, "vm create -", &spec.to_string());
            site.refused(false, &format!("vm boot {vm}"), &vm, part);
            // Root copies the user's file, and changes another part of it.
            let mut own = spec.clone();
            own["cpus"] = 2.into();
            if verb == "applied" {
                own["object"] = "vm".into();
            }
            let file = site.agent.directory().join("own.json");
            fs::write(&file, own.to_string()).unwrap();
            for line in lines {
                let line = line.replace("{vm}", &vm).replace("{file}", file.to_str().unwrap());
                site.succeeds(true, &line, &own.to_string());
            }
            let booted = booted.replace("{vm}", &vm);
            site.refused(true, &format!("vm boot {booted}"), &booted, part);
            if lines.iter().any(|line| line.contains("autostart")) {
                unasked.push(vm);
            }
        }
    }
    // The next agent boots VMs with `autostart`.
    site.agent.restart();
    for vm in unasked {
        let status = site.agent.wait_for_state(&vm, VmState::Failed).status;
        assert_eq!(status.cause.unwrap().code, CauseCode::BootFailed, "{vm}");
        site.is_at_rest(&vm);
    }
    site.assert_kept();
}

/// The reverse: the user changes a part of root's own VM. A kernel or a command line can show the initramfs.
#[test]
fn a_user_who_changes_a_part_must_be_able_to_read_the_others() {
    let site = Site::start();
    let edits = [json!({ "boot": { "cmdline": "dump" } }), json!({ "boot": { "kernel": "small-guest2" } })];
    for (n, edit) in edits.iter().enumerate() {
        let vm = format!("own{n}");
        fs::copy(
            site.agent.directory().join("images/small-guest"),
            site.agent.directory().join("images/small-guest2"),
        )
        .unwrap();
        site.agent.create(&site.spec(&vm, "initramfs")).unwrap();
        // Root may boot the VM with its own choice of files.
        site.agent.act(&vm, VmAction::Boot).unwrap_or_else(|problem| panic!("{problem:?}"));
        site.agent.act(&vm, VmAction::Stop).unwrap();
        let patch = site.agent.directory().join("patch.json");
        fs::write(&patch, edit.to_string()).unwrap();
        site.succeeds(false, &format!("vm patch {vm} -f {}", patch.display()), "");
        site.refused(true, &format!("vm boot {vm}"), &vm, "initramfs");
        // The boot of a copy is refused, too.
        site.succeeds(true, &format!("vm clone {vm} {vm}-copy"), "");
        site.refused(true, &format!("vm boot {vm}-copy"), &format!("{vm}-copy"), "initramfs");
    }
    site.assert_kept();
}
