// SPDX-License-Identifier: Apache-2.0

//! The connection to the vmm, and its events.

use super::*;

impl Actor {
    pub(super) async fn connect(&mut self) -> Result<State, Problem> {
        let opened = Connection::open(
            &self.directory.control(),
            self.vm.id,
            boot::adapters(&self.vm.value.spec),
            &self.allowance,
        )
        .await;
        let (connection, greeting, events) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                if error.is_nonsense() {
                    self.misbehave(&chain(&error)).await;
                }
                let problem = error.problem();
                // Log only once: the agent keeps trying, and a vmm can give another reason each time.
                if self.unreachable.replace(problem.detail.to_string()).is_none() {
                    tracing::warn!(vm = %self.name(), "no connection to its process, which runs on: {problem}");
                }
                return Err(problem);
            }
        };
        self.unreachable = None;
        self.adopt(connection, events).await;
        self.run.boots = greeting.boots;
        // Clear the mark of a pause that never happened. It would keep the VM paused after a full disk has room
        // again.
        self.run.pause_asked &= greeting.state == State::Paused;
        self.repeat_limits();
        self.on_state(greeting.state).await;
        Ok(greeting.state)
    }

    pub(super) async fn adopt(&mut self, connection: Connection, events: mpsc::Receiver<MachineEvent>) {
        let console = tokio::spawn(watch_console(
            connection.clone(),
            self.directory.clone(),
            Arc::clone(&self.outlets.console),
        ));
        self.outlets.connection.send_replace(Some(connection.clone()));
        switch_client::connected(&self.env, self.vm.id, &connection, &self.expel).await;
        self.link = Some(Link { connection, events, console: console.abort_handle() });
    }

    pub(super) async fn disconnected(&mut self) {
        self.link = None;
        switch_client::disconnected(&self.env, self.vm.id).await;
        // Wake the console's followers: no more output comes over this connection.
        self.outlets.console.send_modify(|n| *n = n.wrapping_add(1));
        self.outlets.connection.send_replace(None);
    }

    /// Handles the events that have arrived by now. Later ones wait for their turn, so a process cannot prolong this.
    pub(super) async fn catch_up(&mut self) {
        let waiting = self.link.as_ref().map_or(0, |link| link.events.len());
        for _ in 0..waiting {
            let Some(event) = self.link.as_mut().and_then(|link| link.events.try_recv().ok()) else { return };
            self.on_event(event).await;
        }
    }

    /// The connection has ended.
    pub(super) async fn on_hang_up(&mut self) {
        match self.link.as_ref().and_then(|link| link.connection.fault()) {
            Some(why) => self.misbehave(&why).await,
            None => self.disconnected().await,
        }
        if self.run.state == VmState::Stopping {
            // The process is about to end, or never received the command, because another process may have replaced
            // the agent's connection.
            let soon = Instant::now().checked_add(LAST_WORDS);
            self.deadline = self.deadline.into_iter().chain(soon).min();
        }
    }

    /// Kills a process that violated the protocol, because its guest has taken it over or it is broken. Its later
    /// messages are ignored.
    async fn misbehave(&mut self, why: &str) {
        tracing::error!(vm = %self.name(), "its process violated the control protocol and is killed: {why}");
        self.misbehaved = Some(format!("Its process violated the control protocol and was killed: {why}."));
        if let Some(process) = &self.process {
            process.kill();
        }
        self.disconnected().await;
    }

    pub(super) async fn on_event(&mut self, event: MachineEvent) {
        if let Some(why) = self.link.as_ref().and_then(|link| link.connection.fault()) {
            // The process sent this event before its violation. Do not trust it any more.
            return self.misbehave(&why).await;
        }
        let MachineEvent { seq, event, rebooted } = event;
        if let Some(rebooted) = rebooted
            && rebooted.await.is_err()
        {
            // The switch has not noted the reboot. The vmm repeats the event on the next connection.
            return;
        }
        if !self.is_known(&event) {
            self.stored = false;
            self.on_machine_event(event).await;
        }
        // The vmm may forget only a stored event. A new state was stored when it was entered.
        if (self.stored || self.store().await.is_ok())
            && let Some(link) = &self.link
        {
            link.connection.noted(seq).await;
        }
    }

    /// Whether an event repeats a stored one: such an event costs no write and no line in the log.
    fn is_known(&self, event: &VmmEvent) -> bool {
        match event {
            // A vmm can only lose a device that it was given.
            VmmEvent::DeviceLost { bdf, .. } => {
                let held = self.held.iter().any(|claim| claim.name == *bdf);
                !held || self.stored && self.run.lost.contains_key(bdf)
            }
            VmmEvent::DiskFull { disk } => {
                let known = self.vm.value.spec.disks.iter().any(|own| own.id.as_str() == disk);
                !known || self.stored && self.run.full.as_deref() == Some(disk)
            }
            _ => false,
        }
    }

    async fn on_machine_event(&mut self, event: VmmEvent) {
        match event {
            VmmEvent::State { state, boots } => {
                // Events from before the first boot have the count 0. They can arrive after the boot has succeeded.
                self.run.boots = self.run.boots.max(boots);
                self.on_state(state).await;
            }
            VmmEvent::Ended { end } => {
                self.end = Some(end);
                self.progress.enter(Stage::EndingProcess);
                // The process now ends by itself. Limit the wait for it.
                self.deadline = self.deadline.or(Instant::now().checked_add(STOP));
            }
            VmmEvent::DeviceLost { bdf, why } => self.on_device_lost(&bdf, why).await,
            VmmEvent::DiskFull { disk } => self.on_disk_full(&disk).await,
            #[allow(unreachable_patterns, reason = "reports are added to the protocol")]
            _ => {}
        }
    }

    pub(super) async fn on_state(&mut self, state: State) {
        let state = match state {
            State::Running => VmState::Running,
            State::Paused => VmState::Paused,
            State::Rebooting => VmState::Rebooting,
            // The end has an event of its own, and the agent itself causes the other two states.
            State::Empty | State::Ready | State::Ended => return,
        };
        if self.run.state != state && !self.run.state.is_at_rest() && self.run.state != VmState::Stopping {
            if state != VmState::Paused {
                self.forget_full();
            }
            self.step(state).await;
        }
    }

    pub(super) async fn on_device_lost(&mut self, bdf: &str, why: DeviceLoss) {
        let Some(claim) = self.held.iter().find(|claim| claim.name == bdf) else { return };
        let what = match &claim.value.adapter {
            Some(vf) => format!("Adapter {} ({bdf})", vf.id),
            None => format!("Device {bdf}"),
        };
        let (code, detail) = match why {
            DeviceLoss::Requested => {
                (CauseCode::VfRemoved, format!("{what} was removed by the host while the guest ran."))
            }
            DeviceLoss::Failed => {
                let backend = self.env.inventory.backend(claim.value.bdf);
                let failure = backend.map_or("failed.", |backend| backend.facts().failure);
                (CauseCode::DeviceFailed, format!("{what} {failure}"))
            }
        };
        tracing::warn!(vm = %self.name(), "{detail}");
        self.run.lost.insert(bdf.to_owned(), cause(code, &detail));
        self.release_lost().await;
        self.env.tell(EventKind::Changed { object: self.subject(), revision: self.vm.revision, by: None });
    }

    /// Presses the power button again if the guest has not reacted.
    fn press_again(&mut self) {
        let Some(ticks) = self.button.filter(|_| self.run.state == VmState::Running) else {
            self.button = None;
            return;
        };
        self.button = Some(ticks.saturating_add(1)).filter(|ticks| *ticks < PRESSED_FOR);
        if ticks > 0
            && ticks.is_multiple_of(PRESS_AGAIN)
            && let Some(link) = &self.link
        {
            let connection = link.connection.clone();
            // Ignore the result: the next press, or the end of the wait, follows in any case.
            tokio::spawn(async move {
                drop(connection.command(VmmCommand::PowerButton, Vec::new(), boot::PROMPT).await);
            });
        }
    }

    /// Releases claims on functions that the guest lost and that are no longer there.
    pub(super) async fn release_lost(&mut self) {
        let gone = |claim: &Held| {
            self.run.lost.contains_key(&claim.name) && !self.env.inventory.has_device(claim.value.bdf)
        };
        let (gone, held): (Vec<Held>, Vec<Held>) = self.held.drain(..).partition(gone);
        self.held = held;
        if gone.is_empty() {
            return;
        }
        let kept = claims::give_back(&self.env, gone, |_| {}).await;
        self.held.extend(kept.into_iter().map(|(claim, _)| claim));
        self.publish();
    }

    pub(super) async fn on_tick(&mut self) {
        if self.process.is_none() {
            return;
        }
        if let (Some(process), Some(deadline)) = (&self.process, self.deadline)
            && deadline <= Instant::now()
        {
            tracing::warn!(vm = %self.name(), "its process does not end and is killed");
            process.kill();
            self.deadline = None;
        }
        let lost = self.link.is_none() && self.misbehaved.is_none();
        // The agent reconnects less often to a process that ends its connection again and again.
        if lost && self.allowance.connect() && self.connect().await.is_ok() {
            tracing::info!(vm = %self.name(), "connected again");
        }
        self.directory.bound_log();
        self.press_again();
        self.look_for_room().await;
        if !self.run.lost.is_empty() {
            self.release_lost().await;
        }
    }
}

/// Wakes the console's followers, until the connection ends.
async fn watch_console(connection: Connection, directory: VmDirectory, grown: Arc<watch::Sender<u64>>) {
    let Ok(ring) = console::Reader::open(&directory.console()) else { return };
    let mut offset = 0;
    loop {
        match connection.command(VmmCommand::ConsoleWait { offset }, Vec::new(), CONSOLE_WAIT).await {
            Ok(_) | Err(CommandError::Timeout(_)) => {}
            Err(_) => return grown.send_modify(|n| *n = n.wrapping_add(1)),
        }
        offset = ring.count().unwrap_or(offset);
        grown.send_modify(|n| *n = n.wrapping_add(1));
        // The guest controls the amount of output, so limit the rate of wake-ups.
        sleep(CONSOLE_PACE).await;
    }
}
