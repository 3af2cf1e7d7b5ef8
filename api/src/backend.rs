// SPDX-License-Identifier: Apache-2.0

//! The API's demands on the agent behind it.

use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use async_trait::async_trait;
use axum::body::Bytes;
use futures_core::Stream;
use tokio::sync::mpsc;
use uuid::Uuid;

use crate::{
    problem::{Problem, ProblemCode},
    router::Source,
    types::*,
};

/// The author of a request. Its text (`uid 1000`, `token ci`) names the author of changes in records and the log.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Caller {
    /// The process at the other end of the Unix socket (SO_PEERCRED, as of when it connected).
    User(User),
    /// A holder of this token, over TCP. No user of the host: it opens no file outside of image directories.
    Token(Arc<str>),
}

/// A process's user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct User {
    /// Effective user id.
    pub uid: u32,
    /// Effective group id.
    pub gid: u32,
    /// Process id, for the log only: it may be another process by now.
    pub pid: Option<i32>,
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Caller::User(user) => write!(f, "uid {}", user.uid),
            Caller::Token(name) => write!(f, "token {name}"),
        }
    }
}

/// A VM after an action.
#[derive(Clone, Debug, PartialEq)]
pub struct Progress {
    /// The VM now.
    pub vm: Vm,
    /// Whether the action is complete; if not it goes on, and the response is 202 in place of 200.
    pub complete: bool,
}

/// The agent, as the REST routes see it.
///
/// Requests have been checked ([`VmSpec::check`]) before they come here. `expect` is the revision of `If-Match`: if the object
/// is at another one, the response is [`Problem::revision_mismatch`]. A method may be dropped at any await when the client goes
/// away, so work that must be completed belongs into a task of the agent's own.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// Whether the agent can do its work.
    async fn health(&self) -> Health;

    /// Creates a VM; it holds nothing of the host yet. One with a `lease` waits for the first client of its lease, for as long as
    /// it waits for a client after the agent's start. Problems: `name_taken`, `mac_in_use`.
    async fn create_vm(&self, caller: Caller, spec: VmSpec, lease: Option<LeaseTerms>)
    -> Result<Vm, Problem>;

    /// Creates a VM like another one. The files of the copy count as the choice of the original's authors.
    ///
    /// # Errors
    /// `not_found`, and those of [`create_vm`](Self::create_vm).
    async fn clone_vm(&self, caller: Caller, source: ObjectRef, name: Name) -> Result<Vm, Problem>;
    /// All VMs by name.
    async fn list_vms(&self) -> Result<Vec<Vm>, Problem>;
    /// One VM.
    async fn get_vm(&self, vm: ObjectRef) -> Result<Vm, Problem>;
    /// Replaces a VM's specification. Problems: `wrong_state` unless it is at rest or the machine stays the same
    /// ([`VmSpec::same_machine`]), `name_taken`, `mac_in_use`, `port_group_not_found`.
    async fn put_vm(
        &self,
        caller: Caller,
        vm: ObjectRef,
        spec: VmSpec,
        expect: Option<u64>,
    ) -> Result<Vm, Problem>;
    /// Stops the VM if it runs, releases its functions, forgets it. Returns when that is done.
    async fn delete_vm(&self, caller: Caller, vm: ObjectRef, expect: Option<u64>) -> Result<(), Problem>;
    /// Begins an action and waits at most `wait` for it to complete. Problems that are known at once (a VF in use, a missing
    /// kernel) are returned even if `wait` is zero; so is a failure of the action during the wait.
    async fn act(
        &self,
        caller: Caller,
        vm: ObjectRef,
        action: VmAction,
        wait: Duration,
    ) -> Result<Progress, Problem>;
    /// Takes the lease of a VM, which then lives by the lease: when all clients have dropped theirs, it is stopped and deleted.
    /// Refused if the lease is that of another holder.
    async fn lease_vm(&self, caller: Caller, vm: ObjectRef, terms: LeaseTerms) -> Result<Lease, Problem>;
    /// Ends the lease of a VM, which lives on. Has no effect on a VM without one.
    async fn end_lease(&self, caller: Caller, vm: ObjectRef) -> Result<(), Problem>;
    /// Enlarges a disk of a running VM, and tells its guest. Problems: `wrong_state` unless the VM runs, `not_found` for a disk
    /// that it does not have, `disk_invalid`.
    async fn resize_disk(&self, caller: Caller, vm: ObjectRef, wanted: DiskSize) -> Result<(), Problem>;
    /// Counters; `wrong_state` while the VM has no process.
    async fn stats(&self, vm: ObjectRef) -> Result<VmStats, Problem>;
    /// The console's log from `offset` on (None: the oldest byte kept; beyond the end: the end), and with `follow` its later
    /// output. The stream ends at the end of the log, or with `follow` when the VM is deleted or at rest.
    async fn read_console(
        &self,
        vm: ObjectRef,
        offset: Option<u64>,
        follow: bool,
    ) -> Result<ConsoleRead, Problem>;
    /// Types bytes on the console; returns how many were taken (the guest may be slow). `wrong_state` while the VM has
    /// no process.
    async fn write_console(&self, caller: Caller, vm: ObjectRef, bytes: Bytes) -> Result<usize, Problem>;

    /// The content of `/metrics`, as OpenMetrics text.
    async fn metrics(&self) -> Result<String, Problem>;
    /// Notes a response to a request (the head of the response: a stream goes on). For metrics; must not wait.
    fn answered(&self, answered: &Answered<'_>);
    /// Notes a request that was refused before it had a caller. For the log and metrics; must not wait.
    fn turned_away(&self, away: &TurnedAway);

    /// All PFs by name.
    async fn list_pfs(&self) -> Result<Vec<Pf>, Problem>;
    /// One PF.
    async fn get_pf(&self, pf: ObjectRef) -> Result<Pf, Problem>;
    /// Changes the number of VFs. Problems: `vfs_in_use`, `too_many_vfs`.
    async fn set_vfs(
        &self,
        caller: Caller,
        pf: ObjectRef,
        count: u32,
        expect: Option<u64>,
    ) -> Result<Pf, Problem>;
    /// All VFs by PF and number.
    async fn list_vfs(&self) -> Result<Vec<Vf>, Problem>;
}

/// A request that got its response, in a bounded set of words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answered<'a> {
    /// The route's path in the document (`/v1/vms/{name}`), empty if no route has the request's.
    pub route: &'a str,
    /// The method, `OTHER` if the API has none such.
    pub method: &'static str,
    /// The status.
    pub status: u16,
    /// From the request's head to the answer's.
    pub elapsed: Duration,
}

/// A request that was refused before it had a caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TurnedAway {
    /// The origin.
    pub source: Source,
    /// `unauthorized` without a token, `forbidden` for a foreign `Host` or a web page.
    pub code: ProblemCode,
}

/// Whether the agent can do its work: nothing in `complaints`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// The faults, a line each, with their cures.
    pub complaints: Vec<String>,
}

/// The client that a lease is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeaseTerms {
    /// The one client that may hold the lease; any client, and several at once, without it.
    pub holder: Option<Uuid>,
}

/// One client's hold on a VM that lives by a lease. Dropping it is the end of the client.
pub struct Lease(Pin<Box<dyn Future<Output = ()> + Send>>);

impl Lease {
    /// A lease that ends when `ended` completes: the VM is gone, or lives without a lease.
    pub fn new(ended: impl Future<Output = ()> + Send + 'static) -> Self {
        Lease(Box::pin(ended))
    }
}

impl Future for Lease {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        self.0.as_mut().poll(context)
    }
}

/// A part of a console's log.
pub struct ConsoleRead {
    /// Offset of the first byte of the stream.
    pub start: u64,
    /// The bytes.
    pub bytes: Pin<Box<dyn Stream<Item = Bytes> + Send>>,
}

impl ConsoleRead {
    /// A read that yields the items of a channel, until its sender is dropped.
    pub fn from_channel(start: u64, receiver: mpsc::Receiver<Bytes>) -> Self {
        ConsoleRead { start, bytes: Box::pin(Received(receiver)) }
    }
}

/// A channel as a stream.
pub(crate) struct Received<T>(pub(crate) mpsc::Receiver<T>);

impl<T> Stream for Received<T> {
    type Item = T;
    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<T>> {
        self.0.poll_recv(context)
    }
}

/// The agent's switches, as the REST routes see them. `expect` is as in [`Backend`].
#[async_trait]
pub trait PolicyBackend: Send + Sync + 'static {
    /// All switches by name.
    async fn list_switches(&self) -> Result<Vec<Switch>, Problem>;
    /// One switch.
    async fn get_switch(&self, switch: ObjectRef) -> Result<Switch, Problem>;
    /// Creates the switch or replaces its specification. Running ports lose the values that it no longer allows.
    async fn put_switch(
        &self,
        caller: Caller,
        name: Name,
        spec: SwitchSpec,
        expect: Option<u64>,
    ) -> Result<Put<Switch>, Problem>;
    /// Forgets a switch; `switch_in_use` while it has port groups.
    async fn delete_switch(
        &self,
        caller: Caller,
        switch: ObjectRef,
        expect: Option<u64>,
    ) -> Result<(), Problem>;

    /// All port groups by name.
    async fn list_port_groups(&self) -> Result<Vec<PortGroup>, Problem>;
    /// One port group.
    async fn get_port_group(&self, group: ObjectRef) -> Result<PortGroup, Problem>;
    /// Creates the port group or replaces its specification. Running ports lose the values that it no longer allows.
    async fn put_port_group(
        &self,
        caller: Caller,
        name: Name,
        spec: PortGroupSpec,
        expect: Option<u64>,
    ) -> Result<Put<PortGroup>, Problem>;
    /// Forgets a port group; `port_group_in_use` while ports use it.
    async fn delete_port_group(
        &self,
        caller: Caller,
        group: ObjectRef,
        expect: Option<u64>,
    ) -> Result<(), Problem>;

    /// All ports by VM and adapter.
    async fn list_ports(&self) -> Result<Vec<Port>, Problem>;
    /// One port; its name (`web1/eth0`) has a slash, so paths name it by id.
    async fn get_port(&self, port: ObjectRef) -> Result<Port, Problem>;
    /// Replaces a port's specification.
    async fn put_port(
        &self,
        caller: Caller,
        port: ObjectRef,
        spec: PortSpec,
        expect: Option<u64>,
    ) -> Result<Port, Problem>;

    /// Decisions that pass the filter, the latest first. The filter's cursor, if there is one, is of a decision; its limit is at
    /// most one above [`MAX_PAGE`].
    async fn decisions(&self, filter: DecisionFilter) -> Result<Vec<Decision>, Problem>;
    /// The events after the one of this id (None: from now on). Begins with [`EventKind::Gap`] if events in between are no
    /// longer kept; ends when the subscriber is too slow; it then subscribes again.
    async fn events(&self, after: Option<u64>) -> Result<mpsc::Receiver<Event>, Problem>;
}

/// An object after PUT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Put<T> {
    /// The object now.
    pub object: T,
    /// Whether it is new.
    pub created: bool,
}
