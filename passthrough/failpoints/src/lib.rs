// SPDX-License-Identifier: Apache-2.0

//! Points at which tests kill or hold the agent or a vmm. After a crash at any of them the next agent must restore
//! order, and a slow step at one of them must not hold up other work.
//!
//! With the feature `test-support`, the environment variable [`VARIABLE`] names a point (`claim.stored`, or
//! `claim.stored:2` for the second time that it is reached). The process kills itself there with SIGKILL, and logs the
//! points that it reaches before. The agent hands the variable on to the vmms that it starts. Without the feature
//! [`reach`] does nothing.
//!
//! If the environment variable [`HOLD`] is `pf.set=PATH`, the process waits at that point as long as PATH exists. Its
//! thread blocks: the agent keeps answering only if the point is where it may block, and a vmm sees the path only
//! before it is confined.
//!
//! ```
//! use failpoints::{Point, reach};
//! reach(Point::ClaimStored);
//! assert_eq!(Point::ClaimStored.name(), "claim.stored");
//! ```

/// The environment variable that names the point to die at.
pub const VARIABLE: &str = "PORTCULLIS_DIE_AT_FOR_TESTS";

/// The environment variable that names the point to wait at.
pub const HOLD: &str = "PORTCULLIS_HOLD_AT_FOR_TESTS";

/// The process that ends at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// The agent.
    Agent,
    /// The agent, for a VF that is a function of the host.
    AgentWithHardware,
    /// The process of a VM.
    Vmm,
}

macro_rules! points {
    ($($(#[doc = $doc:literal])+ $point:ident = $name:literal, $victim:ident;)+) => {
        /// All points. The crash matrix of the tests goes through each, and fails if one is never reached.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Point {
            $($(#[doc = $doc])+ $point,)+
        }

        impl Point {
            /// All points.
            pub const ALL: &[Self] = &[$(Self::$point),+];

            /// Its name in [`VARIABLE`].
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$point => $name),+ }
            }

            /// The process that dies there.
            #[must_use]
            pub fn victim(self) -> Victim {
                match self { $(Self::$point => Victim::$victim),+ }
            }
        }
    };
}

points! {
    // The agent creates a VM.
    /// Nothing is stored yet.
    CreateBegun = "create.begun", Agent;
    /// The VM is stored, its ports are not.
    CreateStored = "create.stored", Agent;
    /// Its ports are stored, the client has no answer yet.
    CreateAttached = "create.attached", Agent;
    // The VM boots: the agent opens its files,
    /// The disk for cloud-init is made.
    OpenSeed = "open.seed", Agent;
    /// The file of a disk, or a backing file, is open and locked.
    OpenLocked = "open.locked", Agent;
    /// The file for the changes of an ephemeral disk is made.
    OpenOverlay = "open.overlay", Agent;
    // makes and opens its interfaces,
    /// A tap for a bridge is made, with all of its queues.
    NicMade = "nic.made", Agent;
    /// The tap is on its bridge.
    NicBridged = "nic.bridged", Agent;
    /// The tap sends from no address.
    NicPortLocked = "nic.port-locked", Agent;
    /// The tap sends from the NIC's address only, and is down.
    NicAddressed = "nic.addressed", Agent;
    /// The tap is up.
    NicUp = "nic.up", Agent;
    /// An existing interface is locked.
    NicLocked = "nic.locked", Agent;
    /// The queues of an existing interface are open.
    NicOpened = "nic.opened", Agent;
    // claims functions,
    /// Functions are chosen.
    ClaimChosen = "claim.chosen", Agent;
    /// A claim is stored.
    ClaimStored = "claim.stored", Agent;
    /// The VM is stored as starting.
    BootBegun = "boot.begun", Agent;
    /// The state of a function was read.
    ClaimRead = "claim.read", Agent;
    /// That state is stored too.
    ClaimRemembered = "claim.remembered", Agent;
    // binds them (also to give them back),
    /// `driver_override` is set.
    BindOverridden = "bind.overridden", AgentWithHardware;
    /// The function has no driver.
    BindUnbound = "bind.unbound", AgentWithHardware;
    /// The function has the new driver.
    BindBound = "bind.bound", AgentWithHardware;
    // and sets them up on the PF.
    /// The function is bound; the former owner of its address is not stored yet.
    BaselineBegun = "baseline.begun", Agent;
    /// The port has the VF; the PF has no setting for it yet.
    BaselineAttached = "baseline.attached", Agent;
    /// The PF has all settings.
    BaselineMade = "baseline.made", Agent;
    // Any change on a PF:
    /// One change is made, those after it are not.
    PfSet = "pf.set", Agent;
    /// All changes are made and were read back.
    PfRead = "pf.read", Agent;
    // The process of the VM.
    /// It is started, its pid is not stored.
    BootSpawned = "boot.spawned", Agent;
    /// Its pid is stored.
    BootProcessStored = "boot.process-stored", Agent;
    /// Its limits are set.
    BootLimited = "boot.limited", Agent;
    /// It is connected.
    BootConnected = "boot.connected", Agent;
    /// The machine is built.
    BootConfigured = "boot.configured", Agent;
    /// It runs, and is stored as starting.
    BootRun = "boot.run", Agent;
    /// It is stored as running.
    BootStored = "boot.stored", Agent;
    // A guest's question.
    /// It has reached the switch.
    AskReceived = "ask.received", Agent;
    /// It is allowed, and its change is begun.
    AskEvaluated = "ask.evaluated", Agent;
    /// The change under way is stored.
    AskJournaled = "ask.journaled", Agent;
    /// The whole change is made, by netlink and by messages.
    AskMade = "ask.made", Agent;
    /// The switch has committed it.
    AskCommitted = "ask.committed", Agent;
    /// The relay has the answer.
    AskAnswered = "ask.answered", Agent;
    /// The decision is on its way to the record; the port's new state is not on its way to the store.
    AskRecorded = "ask.recorded", Agent;
    // The process is gone, or ends: the agent releases all claims.
    /// The vmm has the command to stop.
    StopBegun = "stop.begun", Agent;
    /// The agent knows that it is gone.
    ReleaseBegun = "release.begun", Agent;
    /// The port's queue is closed, and the VF is clean.
    ReleaseCleaned = "release.cleaned", Agent;
    /// The function is reset.
    ReleaseReset = "release.reset", Agent;
    /// The PF has the former settings again.
    ReleaseSettings = "release.settings", Agent;
    /// The function has the former driver again.
    ReleaseRestored = "release.restored", Agent;
    /// The port has no VF.
    ReleaseUnbound = "release.unbound", Agent;
    /// The claim is deleted.
    ReleaseUnclaimed = "release.unclaimed", Agent;
    /// All claims are deleted, the VM is not stored as stopped.
    ReleaseDone = "release.done", Agent;
    /// The control group is removed.
    ReleaseUnlimited = "release.unlimited", Agent;
    /// The control socket is removed.
    ReleaseClosed = "release.closed", Agent;
    /// The VM is stored as stopped.
    ReleaseStored = "release.stored", Agent;
    // The VM is deleted.
    /// It is stopped.
    DeleteBegun = "delete.begun", Agent;
    /// A port is deleted, the state of its VF is not.
    DeletePort = "delete.port", Agent;
    /// All ports are deleted.
    DeleteDetached = "delete.detached", Agent;
    /// The VM is deleted, with the record of its run.
    DeleteStored = "delete.stored", Agent;
    // In the process of a VM.
    /// It is started.
    VmmStarted = "vmm.started", Vmm;
    /// The agent has its greeting.
    VmmGreeted = "vmm.greeted", Vmm;
    /// The devices are open, the process still has all privileges.
    VmmOpened = "vmm.opened", Vmm;
    /// The privileges are gone.
    VmmConfined = "vmm.confined", Vmm;
    /// The machine is built.
    VmmBuilt = "vmm.built", Vmm;
    /// It runs.
    VmmRun = "vmm.run", Vmm;
    /// A relay has a question.
    VmmAsking = "vmm.asking", Vmm;
    /// The answer is there, the guest does not have it.
    VmmAnswered = "vmm.answered", Vmm;
    /// The machine is reset for the next boot, which has not begun.
    VmmReset = "vmm.reset", Vmm;
    /// The agent has sent the command to stop.
    VmmStopping = "vmm.stopping", Vmm;
    /// The machine is gone, the agent does not know it.
    VmmStopped = "vmm.stopped", Vmm;
}

/// Marks that `point` is reached.
#[cfg(not(feature = "test-support"))]
#[inline(always)]
pub fn reach(_point: Point) {}

/// Marks that `point` is reached. Does not return if a test wants the process to end here.
#[cfg(feature = "test-support")]
pub fn reach(point: Point) {
    use std::sync::atomic::{AtomicU32, Ordering};
    static REACHED: AtomicU32 = AtomicU32::new(0);
    hold(point);
    let Some((chosen, time)) = chosen() else { return };
    if chosen != point.name() || REACHED.fetch_add(1, Ordering::SeqCst) + 1 != *time {
        tracing::info!(point = point.name(), "reached");
        return;
    }
    tracing::error!(point = chosen, "killed by a test");
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    // The signal is pending.
    loop {
        std::thread::park();
    }
}

/// Waits at the point of [`HOLD`].
#[cfg(feature = "test-support")]
fn hold(point: Point) {
    static HELD: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    let held = HELD.get_or_init(|| std::env::var(HOLD).ok()).as_deref();
    let Some((name, path)) = held.and_then(|held| held.split_once('=')) else { return };
    while name == point.name() && std::path::Path::new(path).exists() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// The point of [`VARIABLE`], and the number of the visit that kills.
#[cfg(feature = "test-support")]
fn chosen() -> Option<(&'static str, &'static u32)> {
    static CHOSEN: std::sync::OnceLock<Option<(String, u32)>> = std::sync::OnceLock::new();
    let read = || parse(&std::env::var(VARIABLE).ok()?);
    CHOSEN.get_or_init(read).as_ref().map(|(point, time)| (point.as_str(), time))
}

#[cfg(feature = "test-support")]
fn parse(text: &str) -> Option<(String, u32)> {
    let (point, time) = text.split_once(':').unwrap_or((text, "1"));
    Some((point.to_owned(), time.parse().ok()?))
}

#[cfg(all(test, feature = "test-support"))]
mod tests {
    use super::*;

    #[test]
    fn a_point_is_named_with_the_time_that_counts() {
        assert_eq!(parse("claim.stored"), Some(("claim.stored".into(), 1)));
        assert_eq!(parse("pf.set:3"), Some(("pf.set".into(), 3)));
        assert_eq!(parse("pf.set:x"), None);
        // No point is chosen here, so it returns.
        for (n, point) in Point::ALL.iter().enumerate() {
            reach(*point);
            assert!(Point::ALL.iter().skip(n + 1).all(|other| other.name() != point.name()));
        }
    }
}
