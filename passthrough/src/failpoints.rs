// SPDX-License-Identifier: Apache-2.0

//! Points at which tests kill or hold the agent or a vmm: whatever a crash there leaves, the next agent must put right, and
//! what takes its time there must not hold up others.
//!
//! With the feature `test-support`, a process in whose environment [`VARIABLE`] names a point (`claim.stored`, or
//! `claim.stored:2` for the second time that it is reached) kills itself there, with SIGKILL. On the way it logs the points that it
//! reaches. The agent hands the variable on to the vmms that it starts. Without the feature [`reach`] is nothing.
//!
//! A process in whose environment [`HOLD`] is `pf.set=PATH` waits at that point as long as PATH exists. It waits with its thread: the
//! agent only answers meanwhile if the point is reached where it may block, and a vmm only sees the path before it is confined.
//!
//! ```
//! use passthrough::failpoints::{Point, reach};
//! reach(Point::ClaimStored);
//! assert_eq!(Point::ClaimStored.name(), "claim.stored");
//! ```

/// The environment variable that names where to die.
pub const VARIABLE: &str = "PORTCULLIS_DIE_AT_FOR_TESTS";

/// The environment variable that names where to wait.
pub const HOLD: &str = "PORTCULLIS_HOLD_AT_FOR_TESTS";

/// Whose end a point is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// The agent.
    Agent,
    /// The agent, where a VF is a function of the host.
    AgentWithHardware,
    /// The process of a VM.
    Vmm,
}

macro_rules! points {
    ($($(#[doc = $doc:literal])+ $point:ident = $name:literal, $victim:ident;)+) => {
        /// All points: the crash matrix of the tests goes through each, and fails if one is never reached.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Point {
            $($(#[doc = $doc])+ $point,)+
        }

        impl Point {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$point),+];

            /// As it is written in [`VARIABLE`].
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$point => $name),+ }
            }

            /// Who dies there.
            #[must_use]
            pub fn victim(self) -> Victim {
                match self { $(Self::$point => Victim::$victim),+ }
            }
        }
    };
}

points! {
    // A VM is created.
    /// Nothing is stored yet.
    CreateBegun = "create.begun", Agent;
    /// The VM is stored, its ports are not.
    CreateStored = "create.stored", Agent;
    /// Its ports are stored, nobody was answered.
    CreateAttached = "create.attached", Agent;
    // It is booted: functions are claimed,
    /// Functions are chosen.
    ClaimChosen = "claim.chosen", Agent;
    /// A claim is stored.
    ClaimStored = "claim.stored", Agent;
    /// The VM is stored as starting.
    BootBegun = "boot.begun", Agent;
    /// What a function is was read.
    ClaimRead = "claim.read", Agent;
    /// And stored.
    ClaimRemembered = "claim.remembered", Agent;
    // bound, also to give them back,
    /// `driver_override` is set.
    BindOverridden = "bind.overridden", AgentWithHardware;
    /// The function has no driver.
    BindUnbound = "bind.unbound", AgentWithHardware;
    /// It has the new one.
    BindBound = "bind.bound", AgentWithHardware;
    // and set up on the PF.
    /// The function is bound; whose its address was is not stored yet.
    BaselineBegun = "baseline.begun", Agent;
    /// The port has the VF, whose PF has no setting yet.
    BaselineAttached = "baseline.attached", Agent;
    /// The PF has all settings.
    BaselineMade = "baseline.made", Agent;
    // Whoever changes something on a PF:
    /// A change is made, those after it are not.
    PfSet = "pf.set", Agent;
    /// All are made and were read back.
    PfRead = "pf.read", Agent;
    // The process of the VM.
    /// It is started, nobody knows its number.
    BootSpawned = "boot.spawned", Agent;
    /// Its number is stored.
    BootProcessStored = "boot.process-stored", Agent;
    /// It is connected.
    BootConnected = "boot.connected", Agent;
    /// The machine is built.
    BootConfigured = "boot.configured", Agent;
    /// It runs, and is stored as starting.
    BootRun = "boot.run", Agent;
    /// It is stored as running.
    BootStored = "boot.stored", Agent;
    // A guest's question.
    /// It is at the switch.
    AskReceived = "ask.received", Agent;
    /// It is allowed, and what it needs is begun.
    AskEvaluated = "ask.evaluated", Agent;
    /// What is under way is stored.
    AskJournaled = "ask.journaled", Agent;
    /// All is made, by netlink and by messages.
    AskMade = "ask.made", Agent;
    /// The switch knows it.
    AskCommitted = "ask.committed", Agent;
    /// The relay was answered.
    AskAnswered = "ask.answered", Agent;
    /// The decision is on its way to the record, what the port has now is not to the store.
    AskRecorded = "ask.recorded", Agent;
    // The process is gone, or ends: all is given back.
    /// The vmm is told to stop.
    StopBegun = "stop.begun", Agent;
    /// The agent knows that it is gone.
    ReleaseBegun = "release.begun", Agent;
    /// The port's lane is closed, and the VF is clean.
    ReleaseCleaned = "release.cleaned", Agent;
    /// The function is reset.
    ReleaseReset = "release.reset", Agent;
    /// The PF has the former settings.
    ReleaseSettings = "release.settings", Agent;
    /// The function has the former driver.
    ReleaseRestored = "release.restored", Agent;
    /// The port has no VF.
    ReleaseUnbound = "release.unbound", Agent;
    /// The claim is deleted.
    ReleaseUnclaimed = "release.unclaimed", Agent;
    /// All claims are, the VM is not stored as at rest.
    ReleaseDone = "release.done", Agent;
    /// It is.
    ReleaseStored = "release.stored", Agent;
    // The VM is deleted.
    /// It is at rest.
    DeleteBegun = "delete.begun", Agent;
    /// A port is deleted, what its VF had is not.
    DeletePort = "delete.port", Agent;
    /// All ports are.
    DeleteDetached = "delete.detached", Agent;
    /// Its state is.
    DeleteRun = "delete.run", Agent;
    /// It is.
    DeleteStored = "delete.stored", Agent;
    // In the process of a VM.
    /// It is started.
    VmmStarted = "vmm.started", Vmm;
    /// The agent was greeted.
    VmmGreeted = "vmm.greeted", Vmm;
    /// The devices are open, all privileges are there.
    VmmOpened = "vmm.opened", Vmm;
    /// The privileges are gone.
    VmmConfined = "vmm.confined", Vmm;
    /// The machine is built.
    VmmBuilt = "vmm.built", Vmm;
    /// It runs.
    VmmRun = "vmm.run", Vmm;
    /// A relay has a question.
    VmmAsking = "vmm.asking", Vmm;
    /// The answer is there, the guest has not heard it.
    VmmAnswered = "vmm.answered", Vmm;
    /// The machine is reset for the next boot, which has not begun.
    VmmReset = "vmm.reset", Vmm;
    /// The agent ordered the end.
    VmmStopping = "vmm.stopping", Vmm;
    /// The machine is gone, the agent does not know.
    VmmStopped = "vmm.stopped", Vmm;
}

/// Says that `point` is reached.
#[cfg(not(feature = "test-support"))]
#[inline(always)]
pub fn reach(_point: Point) {}

/// Says that `point` is reached. Does not return if a test wants the process to end here.
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
    // The signal is there already, or soon.
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

/// The point of [`VARIABLE`], and which time it counts.
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
        // Nothing is chosen here: it returns.
        for (n, point) in Point::ALL.iter().enumerate() {
            reach(*point);
            assert!(Point::ALL.iter().skip(n + 1).all(|other| other.name() != point.name()));
        }
    }
}
