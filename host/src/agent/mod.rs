// SPDX-License-Identifier: Apache-2.0

//! `portcullis serve`: one agent per run directory, serving the API on a Unix socket.

mod backend;
mod console;
mod listen;
mod pfs;
mod strangers;
mod view;

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use anyhow::{Context, bail};
use api::{Limits, types::Protection};
use options::{
    assignable::Assignable,
    user_ids::{self, UserArgs},
};
use rustix::{
    fs::{FlockOperation, flock},
    process::geteuid,
};
use services::{
    decisions::{DecisionLog, events::EventHub},
    pf::{PfHandle, watch},
};
use simnic::{MAX_PFS, SimPfOption};
use sriov::Sysfs;
use store::{SqliteStore, Stores};
#[cfg(feature = "test-support")]
use switch::Late;
use switch::{Parts, Policy, SwitchHandle, Timing, VerdictSource};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::oneshot,
};

pub use backend::Agent;
use listen::ListenArgs;

use crate::{
    backend::Simulation,
    environment::{Environment, Users},
    host_pfs::HostPfs,
    log, sandbox,
    sim::{Simulated, Start},
};

/// How long all VMs may take to stop, after the time that their guests have to power off.
const STOP_ALL: Duration = Duration::from_secs(60);

/// The database, in the state directory.
const DATABASE: &str = "portcullis.db";
/// The directory with the files of ephemeral disks, in the state directory unless an option has another.
const EPHEMERAL: &str = "ephemeral";

/// The treatment of VMs at the agent's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OnExit {
    /// VMs run on, and the next agent adopts them.
    Leave,
    /// The agent presses the power buttons of VMs, and stops VMs with guests that do not power off.
    Stop,
}

/// Options of `portcullis serve`.
#[derive(Clone, Debug, clap::Args)]
pub struct ServeArgs {
    /// The directory of the database.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/portcullis")]
    pub state_dir: PathBuf,
    /// The directory of control sockets, console logs and the lock; it need not outlive the host's
    /// boot.
    #[arg(long, value_name = "DIR", default_value = "/run/portcullis")]
    pub run_dir: PathBuf,
    /// A directory with kernels and initramfs that every caller may boot; may be repeated.
    #[arg(long = "image-dir", value_name = "DIR")]
    pub image_dirs: Vec<PathBuf>,
    /// A directory with disks that every caller may use, for reading and writing; may be repeated.
    #[arg(long = "disk-dir", value_name = "DIR")]
    pub disk_dirs: Vec<PathBuf>,
    /// A directory of a file system with room for the changes of ephemeral disks; the directory `ephemeral` in the state
    /// directory if it is not given.
    #[arg(long, value_name = "DIR")]
    pub ephemeral_dir: Option<PathBuf>,
    /// An interface of the host that VMs' NICs may use: a bridge, a tap or a macvtap. May be repeated.
    #[arg(long = "interface", value_name = "NAME")]
    pub interfaces: Vec<String>,
    /// The user ids of VMs' processes.
    #[command(flatten)]
    pub users: UserArgs,
    /// A function of the host that VMs may have under `devices`: its address, or vendor and device
    /// for all of a model, with `,no-reset` if it may change its VM without a reset. Without this
    /// option VMs get no devices: on a host with an assignable disk, a user of the API is root. The
    /// value may also be a PF: adapters then have VFs of the named PFs only. May be repeated.
    #[arg(long, value_name = "BDF|VENDOR:DEVICE|PF")]
    pub assignable: Vec<Assignable>,
    /// The directory of the control groups (version 2) of VMs with limits; created if it is
    /// missing.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/cgroup/portcullis")]
    pub cgroup_parent: PathBuf,
    /// The number of decisions to keep; the oldest are deleted first.
    #[arg(long, value_name = "COUNT", default_value_t = services::decisions::KEPT, value_parser = clap::value_parser!(u32).range(100..10_000_000))]
    pub decisions_kept: u32,
    /// Stops a VM whose process has deferred the revocation of rights for so many seconds, because the guest has not reset its VF.
    /// An honest process defers while the guest's interface is down, or has no driver after a reboot. Without this option it may do
    /// so for any time.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    pub revocation_deadline: Option<u64>,
    /// Grant every request of every guest, whatever the policy says: shows that a test would notice.
    #[cfg(feature = "test-support")]
    #[arg(long)]
    pub policy_bypass_for_tests: bool,
    /// Make guests' changes of their addresses on the PF only after this time.
    #[cfg(feature = "test-support")]
    #[arg(long, value_name = "MS", default_value_t = 0)]
    pub late_address_for_tests: u64,
    /// Grant guests' multicast lists only after this time.
    #[cfg(feature = "test-support")]
    #[arg(long, value_name = "MS", default_value_t = 0)]
    pub late_multicast_for_tests: u64,
    /// Wait for the clients of leases only for this time.
    #[cfg(feature = "test-support")]
    #[arg(long, value_name = "MS")]
    pub lease_grace_for_tests: Option<u64>,
    /// A simulated adapter: an 82576 called NAME with COUNT VFs, and a tap device as its uplink if one is named. May be
    /// repeated.
    #[arg(long = "sim-pf", value_name = "NAME=COUNT[,tap=IFNAME]")]
    pub sim_pfs: Vec<SimPfOption>,
    /// Parts of the sandbox of VMs' processes to leave off, to find the one that is in the way:
    /// own_user, namespaces, empty_root, limits, seccomp, landlock; or `unavailable` for those that
    /// this host's kernel does not support. Such an agent boots no VM with functions of the host;
    /// each VM's status has the parts.
    #[arg(long, value_name = "PART[,PART]", value_delimiter = ',')]
    pub sandbox_off: Vec<sandbox::Off>,
    /// Whether VMs run on or are stopped when the agent ends (SIGTERM, SIGINT). A second signal ends the agent at once,
    /// and leaves VMs as they are.
    #[arg(long, value_enum, default_value_t = OnExit::Leave)]
    pub on_exit: OnExit,
    /// The seconds that guests have to power off with --on-exit stop; 0 stops VMs at once.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(0..=3600))]
    pub exit_timeout: u32,
    /// The agent belongs to the process at the other end of its standard input, and has simulated adapters only. It
    /// ends with its standard input, and removes this directory, which has all of its files.
    #[arg(long, value_name = "DIR", hide = true)]
    pub private: Option<PathBuf>,
    /// The format of the log. Lines for the journal have a priority and no time, because the journal adds its own.
    #[arg(long, value_enum, default_value_t = log::Format::Text)]
    pub log_format: log::Format,
    /// Where the API is served.
    #[command(flatten)]
    pub listen: ListenArgs,
}

/// Starts the runtime and the log, and runs the agent. It serves the API on `socket`; `token_file` has the tokens of
/// clients over TCP.
///
/// # Errors
/// As [`serve`].
pub fn run(args: ServeArgs, socket: &Path, token_file: Option<&Path>) -> anyhow::Result<()> {
    log::start(args.log_format);
    // One worker: blocking work has threads of its own, and each hand-over of a task from one worker to another would
    // delay the response to a waiting guest.
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    runtime.worker_threads(1).enable_all().build()?.block_on(serve(args, socket, token_file))
}

/// Runs the agent until SIGTERM or SIGINT.
///
/// # Errors
/// The agent cannot start: another agent runs, or the database or the socket cannot be used.
pub async fn serve(args: ServeArgs, socket: &Path, token_file: Option<&Path>) -> anyhow::Result<()> {
    // First, so that a signal during the start below leads to an orderly end, too.
    let told = told_to_end()?;
    let _run_lock = lock(&args.run_dir, "run directory", "--run-dir", 0o755)?;
    // Two agents with one database would each stop the VMs of the other.
    let _state_lock = lock(&args.state_dir, "state directory", "--state-dir", 0o700)?;
    let database = args.state_dir.join(DATABASE);
    let stores = Stores::on_one_host(Arc::new(SqliteStore::open(&database)?));
    let mut env = Environment::new(&stores, args.run_dir.clone());
    env.serving.send_replace(false);
    env.image_dirs = directories(&args.image_dirs, "image")?;
    env.disk_dirs = directories(&args.disk_dirs, "disk")?;
    env.ephemeral_dir = match &args.ephemeral_dir {
        Some(dir) => directory(dir, "ephemeral")?,
        None => directory(&args.state_dir, "state")?.join(EPHEMERAL),
    };
    env.interfaces.clone_from(&args.interfaces);
    env.cgroup_parent.clone_from(&args.cgroup_parent);
    env.inventory.set_assignable(args.assignable.clone().into());
    env.inventory.assignable().warn(&Sysfs::default());
    env.sandbox_off = sandbox::off(&args.sandbox_off)?;
    #[cfg(feature = "test-support")]
    if let Some(grace) = args.lease_grace_for_tests {
        env.lease_grace = Duration::from_millis(grace);
    }
    if geteuid().is_root() {
        // A simulated PF has the user of its number.
        let adapters = if args.sim_pfs.is_empty() { 0 } else { usize::from(MAX_PFS) };
        user_ids::require(Path::new("/"), &args.users.range(adapters))?;
        env.users = Some(Users::new(args.users.vmm_uid_base, args.users.vmm_uid_count));
    } else {
        let off = Protection::OF_ROOT.map(Protection::as_str).join(", ");
        tracing::warn!(
            off,
            "the agent is not root: VMs get simulated adapters only, and parts of the sandbox of their \
             processes are off"
        );
        env.inventory.leave_out_backends_of_root();
    }
    if args.private.is_some() {
        // A demonstration takes no function of the host.
        env.inventory.leave_out_backends_of_root();
    }
    let simulated = start_simulated(&args, &stores, &env).await?;
    env.inventory.add(Simulation::new(Arc::clone(&simulated)));
    let private = args.private.clone();
    let served = serve_with(args, socket, token_file, env, stores, &simulated, told).await;
    match (private, &served) {
        // The process that started the agent may remove it, too.
        (Some(directory), Ok(())) => drop(fs::remove_dir_all(directory)),
        // No other agent would find the simulated adapters. This one has not served, so no VM has a VF. The directory
        // stays: the process that started the agent reads the log in it.
        (Some(_), Err(_)) => simulated.leave(&[]).await,
        (None, _) => {}
    }
    served
}

/// Runs the agent with its simulated adapters until a signal or the end of standard input.
async fn serve_with(
    args: ServeArgs,
    socket: &Path,
    token_file: Option<&Path>,
    env: Environment<()>,
    stores: Stores,
    simulated: &Simulated,
    told: oneshot::Receiver<()>,
) -> anyhow::Result<()> {
    let policy = start_switch(&args, stores, &args.state_dir.join(DATABASE), &env).await?;
    let env = Arc::new(env.with_policy(policy.clone()));
    let agent = Arc::new(Agent::start(Arc::clone(&env)).await?);
    let listeners = listen::all(&args.listen, socket, token_file)?;
    env.serving.send_replace(true);
    let alone = args.private.is_some().then(stdin_ends).transpose()?;
    let ending = Arc::clone(&env);
    let end = async move {
        tokio::select! {
            _ = told => {}
            Ok(()) = async { alone.ok_or(())?.await.map_err(drop) } => {}
        }
        // Set before the first connection is closed, so that no lease ends with it.
        ending.ending.store(true, Ordering::SeqCst);
    };
    tracing::info!(socket = %socket.display(), "ready");
    let routes = api::router_with_policy(Arc::clone(&agent) as Arc<dyn api::Backend>, Arc::new(policy));
    api::serve(listeners, routes, Limits::default(), end).await;
    // No client should connect to an agent that is gone. The socket is this agent's own: the lock is still held.
    drop(fs::remove_file(socket));
    match args.on_exit {
        OnExit::Leave => tracing::info!("the agent ends; VMs run on"),
        OnExit::Stop => {
            tracing::info!("stopping all VMs");
            agent.power_off_all(Duration::from_secs(args.exit_timeout.into())).await;
            agent.stop_all(STOP_ALL).await;
        }
    }
    agent.leave().await;
    // If the claims cannot be read, all simulated PFs count as used.
    if let Ok(claims) = env.claims.list().await {
        let claims: Vec<_> = claims.into_iter().map(|entry| entry.value).collect();
        simulated.leave(&claims).await;
    }
    Ok(())
}

/// A receiver that completes at the end of standard input. All input is ignored.
fn stdin_ends() -> io::Result<oneshot::Receiver<()>> {
    let (ended, told) = oneshot::channel();
    // Not a task of the runtime, because the runtime's end would wait for it.
    std::thread::Builder::new().name("stdin".into()).spawn(move || {
        drop(io::copy(&mut io::stdin(), &mut io::sink()));
        let _ = ended.send(());
    })?;
    Ok(told)
}

/// A receiver that completes at the first SIGTERM or SIGINT from now on. The second ends the process at once.
fn told_to_end() -> io::Result<oneshot::Receiver<()>> {
    let mut signals = [signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?];
    let (tell, told) = oneshot::channel();
    tokio::spawn(async move {
        one_of(&mut signals).await;
        let _ = tell.send(());
        one_of(&mut signals).await;
        tracing::warn!("second signal: the agent ends at once and leaves VMs as they are");
        std::process::exit(1);
    });
    Ok(told)
}

async fn one_of([terminate, interrupt]: &mut [Signal; 2]) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// Starts simulated adapters, or finds those of a former agent.
async fn start_simulated(
    args: &ServeArgs,
    stores: &Stores,
    env: &Environment<()>,
) -> anyhow::Result<Arc<Simulated>> {
    for option in &args.sim_pfs {
        if env.inventory.pf_by_name(&option.name).is_ok() {
            bail!(
                "{} is an adapter of this host: give the simulated PF another name (--sim-pf)",
                option.name
            );
        }
    }
    // The user ids after those of VMs.
    let users = args.users.vmm_uid_base.saturating_add(args.users.vmm_uid_count);
    let start = Start::new(&args.run_dir, env.users.is_some().then_some(users), env.protections_off());
    let simulated = Simulated::load(stores, &args.sim_pfs, start).await?;
    let all = Arc::clone(&simulated);
    tokio::task::spawn_blocking(move || all.start_all()).await??;
    Ok(simulated)
}

/// Starts the switch, and the event hub, decision log and PF control that it works with.
async fn start_switch(
    args: &ServeArgs,
    stores: Stores,
    database: &Path,
    env: &Environment<()>,
) -> anyhow::Result<Policy> {
    let events = EventHub::default();
    let decisions = DecisionLog::open(database, args.decisions_kept, events.clone())?;
    let hints = watch::start().inspect_err(|error| {
        tracing::warn!("Cannot receive interface events ({error}): the agent only compares PFs every 30 s");
    });
    // Ports know PFs by the names that these had when their VFs were claimed.
    crate::vm::claims::keep_pf_names(env).await?;
    let parts = Parts {
        store: stores,
        pf: PfHandle::start(HostPfs::new(env.inventory.clone()))?,
        decisions: decisions.clone(),
        events: events.clone(),
        hints: hints.ok(),
        metrics: env.metrics.clone(),
        timing: Timing {
            deferred: args.revocation_deadline.map(Duration::from_secs),
            #[cfg(feature = "test-support")]
            late: Late {
                address: Duration::from_millis(args.late_address_for_tests),
                multicast: Duration::from_millis(args.late_multicast_for_tests),
            },
            ..Timing::default()
        },
        verdict_source: verdict_source(args),
    };
    Ok(Policy { switch: SwitchHandle::start(parts).await?, decisions, events })
}

/// The policy of each port decides, except in an agent for tests of tests.
#[cfg(feature = "test-support")]
fn verdict_source(args: &ServeArgs) -> VerdictSource {
    if args.policy_bypass_for_tests {
        tracing::error!("EVERY REQUEST OF EVERY GUEST IS GRANTED: this agent is for tests of tests");
        return VerdictSource::Permissive;
    }
    VerdictSource::Policy
}

/// The policy of each port decides.
#[cfg(not(feature = "test-support"))]
fn verdict_source(_: &ServeArgs) -> VerdictSource {
    VerdictSource::Policy
}

/// Makes sure that this agent is the only one of a directory, as long as the file is open. `option` names the directory on the
/// command line; `mode` is for a directory that is not there yet.
fn lock(directory: &Path, what: &str, option: &str, mode: u32) -> anyhow::Result<File> {
    let at = || format!("The {what} {} cannot be used ({option})", directory.display());
    DirBuilder::new().recursive(true).mode(mode).create(directory).with_context(at)?;
    let path = directory.join("agent.lock");
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = file.with_context(at)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => bail!(
            "Another agent is running with the {what} {}: stop it, or choose another with {option}",
            directory.display()
        ),
        Err(error) => Err(io::Error::from(error)).with_context(at),
    }
}

fn directories(dirs: &[PathBuf], kind: &str) -> anyhow::Result<Vec<PathBuf>> {
    dirs.iter().map(|dir| directory(dir, kind)).collect()
}

fn directory(dir: &Path, kind: &str) -> anyhow::Result<PathBuf> {
    dir.canonicalize().with_context(|| format!("The {kind} directory {} cannot be used", dir.display()))
}

#[cfg(test)]
mod tests;
