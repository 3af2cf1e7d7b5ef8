// SPDX-License-Identifier: Apache-2.0

//! VMs that wait for room on the file system of a disk.

use tokio::task::JoinHandle;

use super::*;
use crate::disks::{self, Directories};

/// The shortest time between two checks of a file system, and between two attempts to resume a VM.
const LOOK: Duration = Duration::from_secs(3);
/// The time after which a VM is resumed in any case: some limits, such as a quota, do not show in the free space.
const AGAIN: Duration = Duration::from_secs(60);
/// The free space in bytes with which a VM is resumed.
const ENOUGH: u64 = 1 << 20;

/// The agent's wait for room.
#[derive(Debug, Default)]
pub(super) struct Room {
    patience: Patience,
    /// The check that is under way. It can hang, because its file system can.
    look: Option<JoinHandle<Option<u64>>>,
    looked: Option<Instant>,
    /// The time of the last line in the log: a guest can run out of room again and again.
    logged: Option<Instant>,
}

/// Decides when to resume a VM. A guest can run out of room again at once, so the pauses between attempts get
/// longer.
#[derive(Debug, Default)]
struct Patience {
    /// The beginning of the present wait.
    since: Option<Instant>,
    /// The last attempt.
    tried: Option<Instant>,
    /// Attempts in a row after which the VM was out of room again within [`AGAIN`].
    in_vain: u32,
}

impl Patience {
    /// Notes that the VM waits. It may have waited since an earlier call.
    fn wait(&mut self, now: Instant) {
        if self.since.is_none() {
            self.since = Some(now);
            let soon = self.tried.is_some_and(|tried| now.saturating_duration_since(tried) < AGAIN);
            self.in_vain = if soon { self.in_vain.saturating_add(1) } else { 0 };
        }
    }

    /// Notes that the VM does not wait.
    fn end(&mut self) {
        self.since = None;
    }

    /// Whether to resume the VM now, with this free space in bytes. Call [`Self::wait`] before.
    fn is_due(&mut self, room: Option<u64>, now: Instant) -> bool {
        let pause = LOOK.saturating_mul(2_u32.saturating_pow(self.in_vain)).min(AGAIN);
        let elapsed = |moment: Option<Instant>| moment.map(|moment| now.saturating_duration_since(moment));
        if elapsed(self.tried).is_some_and(|elapsed| elapsed < pause) {
            return false;
        }
        let waited = elapsed(self.since.max(self.tried)).unwrap_or_default();
        let due = room.is_some_and(|room| room >= ENOUGH) || waited >= AGAIN;
        if due {
            // If the attempt fails, a new wait begins, even between two checks.
            (self.tried, self.since) = (Some(now), None);
        }
        due
    }
}

impl Actor {
    /// Notes that a disk has no room. The VM is paused, or about to be.
    pub(super) async fn on_disk_full(&mut self, id: &str) {
        let Some(disk) = self.vm.value.spec.disks.iter().find(|disk| disk.id.as_str() == id) else { return };
        let detail = format!(
            "The file system of the disk {id} ({}) is full: make room on it. The VM goes on by itself then; `portcullis vm \
             resume {}` makes it try at once.",
            self.written(disk),
            self.name()
        );
        let now = Instant::now();
        if self.room.logged.is_none_or(|logged| now.saturating_duration_since(logged) >= AGAIN) {
            tracing::warn!(vm = %self.name(), "{detail}");
            self.room.logged = Some(now);
        }
        self.run.full = Some(id.to_owned());
        self.run.cause = Some(cause(CauseCode::DiskFull, &detail));
        if self.run.state == VmState::Paused {
            self.tell_state();
        }
    }

    /// Forgets the full disk, because the VM runs again.
    pub(super) fn forget_full(&mut self) {
        if self.run.full.take().is_some() {
            self.run.cause = None;
        }
    }

    /// The file that has the writes to a disk, or the directory of an unnamed file.
    fn written(&self, disk: &api::types::DiskSpec) -> String {
        if disk.ephemeral { self.env.ephemeral_dir.display().to_string() } else { disk.path.clone() }
    }

    /// The file of the disk for which the VM waits, or its directory, unless a request keeps it paused.
    fn waits_for(&self) -> Option<String> {
        let id = self.run.full.as_deref().filter(|_| self.run.state == VmState::Paused)?;
        let disk = self.vm.value.spec.disks.iter().find(|disk| disk.id.as_str() == id)?;
        (!self.run.pause_asked && self.link.is_some()).then(|| self.written(disk))
    }

    /// Checks for room, and resumes the VM if there is some. Called at each tick.
    pub(super) async fn look_for_room(&mut self) {
        let Some(path) = self.waits_for() else { return self.room.patience.end() };
        let now = Instant::now();
        self.room.patience.wait(now);
        if let Some(look) = self.room.look.take_if(|look| look.is_finished()) {
            let room = look.await.ok().flatten();
            if self.room.patience.is_due(room, now) {
                tracing::debug!(vm = %self.name(), ?room, "it goes on: its disk may have room");
                let (done, _) = oneshot::channel();
                // If this fails, a later tick tries again.
                drop(self.command(VmAction::Resume, VmmCommand::Run, done));
            }
        }
        let elapsed = self.room.looked.map(|looked| now.saturating_duration_since(looked));
        if self.room.look.is_none() && elapsed.is_none_or(|elapsed| elapsed >= LOOK) {
            let dirs = Directories::of(&self.env);
            self.room.looked = Some(now);
            self.room.look = Some(tokio::task::spawn_blocking(move || disks::room(&dirs, &path)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The seconds of the attempts, for looks every 3 s at `room`. The VM is out of room again `after` each attempt.
    fn attempts(room: impl Fn(u64) -> Option<u64>, after: u64) -> Vec<u64> {
        let (begun, mut patience) = (Instant::now(), Patience::default());
        let mut waits_from = 0;
        let mut all = Vec::new();
        for second in (0..600).step_by(3) {
            let now = begun + Duration::from_secs(second);
            if second < waits_from {
                patience.end();
                continue;
            }
            patience.wait(now);
            if patience.is_due(room(second), now) {
                all.push(second);
                waits_from = second + after;
            }
        }
        all
    }

    #[test]
    fn a_vm_goes_on_when_there_is_room() {
        assert_eq!(attempts(|second| Some(if second < 30 { ENOUGH - 1 } else { ENOUGH }), 1000), [30]);
        assert_eq!(attempts(|_| Some(ENOUGH), 1000), [0]);
    }

    #[test]
    fn a_vm_tries_once_a_minute_in_any_case() {
        for room in [None, Some(0)] {
            assert_eq!(attempts(|_| room, 3)[..4], [60, 123, 186, 249], "{room:?}");
        }
    }

    /// As with a quota: the file system has room, and the guest gets none.
    #[test]
    fn attempts_in_vain_get_rarer() {
        let all = attempts(|_| Some(1 << 40), 0);
        let pauses: Vec<u64> = all.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert_eq!(pauses[..7], [6, 12, 24, 48, 60, 60, 60]);
        let calm = attempts(|_| Some(1 << 40), 63);
        assert!(calm.windows(2).all(|pair| pair[1] - pair[0] == 63), "{calm:?}");
    }
}
