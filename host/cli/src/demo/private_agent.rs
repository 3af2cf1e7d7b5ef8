// SPDX-License-Identifier: Apache-2.0

//! An agent on a socket of its own, in a directory of its own, with a simulated adapter.

use std::{
    fs::{self, DirBuilder, File},
    io,
    ops::RangeInclusive,
    os::unix::{fs::DirBuilderExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use api::Client;
use options::user_ids::DEFAULT_BASE;
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::{DemoError, tail};
use crate::small_guest;

/// The simulated PF's name, and its VFs.
pub(super) const PF: &str = "sim0";
pub(super) const VFS: u16 = 2;
/// The image's name for VMs' specifications.
pub(super) const KERNEL: &str = "small-guest";

/// The time for the agent to start serving, and to stop.
const START: Duration = Duration::from_secs(20);
const STOP: Duration = Duration::from_secs(20);
const STEP: Duration = Duration::from_millis(5);
/// The user ids of demonstrations' processes under root: some way behind those of the VMs of a host's agent, because
/// processes of one user may signal each other.
const USERS: RangeInclusive<u32> = DEFAULT_BASE + 100_000..=DEFAULT_BASE + 115_999;
/// The user ids of one demonstration: those of its VMs, and then those of its adapters.
const USERS_OF_ONE: u32 = 16;
const USERS_OF_VMS: u32 = 8;
/// Paths of sockets in the directory must stay below 108 bytes (unix(7)).
const LONGEST_BASE: usize = 40;

/// A running agent.
pub(super) struct PrivateAgent {
    directory: PathBuf,
    child: Child,
    pub(super) client: Client,
}

impl PrivateAgent {
    /// Starts the agent, with these further options; it does not serve yet.
    pub(super) fn start(options: &[&str]) -> Result<Self, DemoError> {
        let directory = make_directory()?;
        Self::start_in(&directory, options).inspect_err(|_| drop(fs::remove_dir_all(&directory)))
    }

    fn start_in(directory: &Path, options: &[&str]) -> Result<Self, DemoError> {
        let failed = |path: PathBuf| move |source| DemoError::Directory { path, source };
        let images = directory.join("images");
        fs::create_dir(&images).map_err(failed(images.clone()))?;
        let kernel = images.join(KERNEL);
        fs::write(&kernel, small_guest::IMAGE).map_err(failed(kernel.clone()))?;
        let path = log_path(directory);
        let log = File::create(&path).map_err(failed(path))?;
        let socket = directory.join("api.sock");
        let mut command = Command::new(std::env::current_exe().map_err(DemoError::Start)?);
        command.arg("--socket").arg(&socket).arg("serve").args(["--on-exit", "stop", "--exit-timeout", "0"]);
        // On a host without Landlock, for example, a demonstration does without it: it has simulated adapters only.
        command.arg("--sandbox-off").arg("unavailable");
        command.arg("--sim-pf").arg(format!("{PF}={VFS}"));
        command.args(users(std::process::id())).args(options);
        for (option, name) in [("--state-dir", "state"), ("--run-dir", "run"), ("--image-dir", "images")] {
            command.arg(option).arg(directory.join(name));
        }
        // If this process is killed, the agent's standard input ends; the agent then ends with all its processes.
        command.arg("--private").arg(directory);
        // A process group of its own: Ctrl-C on a terminal is for the demo, which then stops the agent in order.
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(log).process_group(0);
        command.env_remove("PORTCULLIS_LOG");
        let child = command.spawn().map_err(DemoError::Start)?;
        Ok(Self { directory: directory.to_owned(), child, client: Client::new(socket) })
    }

    /// Waits until the agent serves.
    pub(super) async fn ready(&self) -> Result<(), DemoError> {
        let deadline = Instant::now() + START;
        while self.client.health().await.is_err() {
            if Instant::now() >= deadline || self.has_ended() {
                return Err(DemoError::NoAgent(self.log_tail(10)));
            }
            sleep(STEP).await;
        }
        Ok(())
    }

    /// The last lines of the agent's log.
    pub(super) fn log_tail(&self, lines: usize) -> String {
        let log = fs::read(log_path(&self.directory)).unwrap_or_default();
        tail(&String::from_utf8_lossy(&log), lines)
    }

    /// Stops the agent with its VMs and its adapter, and removes its directory.
    pub(super) async fn stop(mut self) {
        let deadline = Instant::now() + STOP;
        // Fails if the agent has ended by itself: it is reaped below then.
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        while Instant::now() < deadline {
            if self.reaped().is_some() {
                return;
            }
            sleep(STEP).await;
        }
        // Dropping `self` kills an agent that is left.
    }

    fn reaped(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Whether the agent is a zombie, or gone. Does not reap it: `stop` and `drop` do that.
    fn has_ended(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap_or_default();
        // The state is behind the name, which is in parentheses.
        stat.rsplit(')')
            .next()
            .is_none_or(|rest| rest.trim_start().starts_with(['Z', 'X']) || rest.is_empty())
    }
}

impl Drop for PrivateAgent {
    fn drop(&mut self) {
        if self.reaped().is_none() {
            drop(self.child.kill());
            drop(self.child.wait());
        }
        drop(fs::remove_dir_all(&self.directory));
    }
}

/// The options of the agent of a demonstration with this process id: demonstrations at one time usually differ.
fn users(pid: u32) -> [String; 2] {
    let slots = (USERS.end() - USERS.start() + 1) / USERS_OF_ONE;
    let base = USERS.start() + pid % slots * USERS_OF_ONE;
    [format!("--vmm-uid-base={base}"), format!("--vmm-uid-count={USERS_OF_VMS}")]
}

fn log_path(directory: &Path) -> PathBuf {
    directory.join("agent.log")
}

/// Makes a new directory that only this user can write.
fn make_directory() -> Result<PathBuf, DemoError> {
    let base = std::env::temp_dir();
    let base = if base.as_os_str().len() > LONGEST_BASE { PathBuf::from("/tmp") } else { base };
    let (unique, ..) = Uuid::new_v4().as_fields();
    let path = base.join(format!("portcullis-demo-{unique:08x}"));
    // Processes of VMs have other users than the agent, and sockets in the directory.
    let made: io::Result<()> = DirBuilder::new().mode(0o711).create(&path);
    match made {
        Ok(()) => Ok(path),
        Err(source) => Err(DemoError::Directory { path, source }),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use options::user_ids::UserArgs;

    use super::*;

    /// The options of the agent that matter here.
    #[derive(Parser)]
    struct Serve {
        #[command(flatten)]
        users: UserArgs,
    }

    fn serve(options: &[String]) -> Serve {
        Serve::try_parse_from(["serve".to_owned()].iter().chain(options)).unwrap()
    }

    #[test]
    fn users_are_those_of_no_other_agent() {
        let hosts = serve(&[]);
        assert!(hosts.users.vmm_uid_base + hosts.users.vmm_uid_count + 1000 < *USERS.start());
        for pid in [1, 999, 1000, 4_194_304, u32::MAX] {
            let args = serve(&users(pid));
            assert!(USERS.contains(&args.users.vmm_uid_base), "{pid}");
            // With the ids of its adapters.
            assert!(USERS.contains(&(args.users.vmm_uid_base + USERS_OF_ONE - 1)), "{pid}");
            assert!(args.users.vmm_uid_count >= u32::from(VFS) && args.users.vmm_uid_count < USERS_OF_ONE);
            let next = serve(&users(pid.wrapping_add(1)));
            assert!(args.users.vmm_uid_base.abs_diff(next.users.vmm_uid_base) >= USERS_OF_ONE, "{pid}");
        }
    }
}
