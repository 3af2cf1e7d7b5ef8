// SPDX-License-Identifier: Apache-2.0

//! Connections of the VMs' processes: their beginning and their end.

use std::sync::Arc;

use netpolicy::{Change, PortId, VmId};

use super::{
    actor::{Actor, Link},
    intake::LinkId,
    port_queue::{Running, Task},
    vmm_client::Vmm,
};

impl Actor {
    /// Whether messages of this connection count. Those of a former or closed connection do not.
    pub(super) fn is_current(&self, vm: VmId, id: LinkId) -> bool {
        self.links.get(&vm).is_some_and(|link| link.online && link.id == id)
    }

    pub(super) fn connected(&mut self, vm: VmId, vmm: Arc<dyn Vmm>, id: LinkId) {
        self.links.insert(vm, Link { id, vmm, online: true });
        for port in self.ports_of(vm) {
            self.tell_standing(port);
            if let Some(port_queue) = self.port_queues.get_mut(&port) {
                // The confirmations of the deferred changes were lost with the connection: command the changes
                // again.
                let lost: Vec<Change> = port_queue.deferred.drain(..).flatten().collect();
                let owed = port_queue.owed || !lost.is_empty();
                if owed {
                    port_queue.push(Task::Correct);
                }
                let untold = std::mem::take(&mut port_queue.untold);
                if untold {
                    port_queue.push(Task::Tell);
                }
                if owed || untold {
                    self.go_on(port);
                }
            }
        }
    }

    pub(super) fn disconnected(&mut self, vm: VmId) {
        if let Some(link) = self.links.get_mut(&vm) {
            link.online = false;
            link.vmm.close();
        }
        for port in self.ports_of(vm) {
            if let Some(port_queue) = self.port_queues.get_mut(&port) {
                port_queue.queue.retain(|work| !matches!(work, Task::Request { .. }));
                port_queue.untold = true;
                // The relay denies the request by itself. Its event has the result of the message.
                if let Some(busy) = &mut port_queue.busy {
                    busy.forwarded = None;
                }
            }
        }
    }

    pub(super) fn begin_tell(&mut self, port: PortId) {
        if let Some(tools) = self.tools(port) {
            self.start(port, Running::other(), tools.tell(self.effective(port)));
        }
    }

    pub(super) fn ports_of(&self, vm: VmId) -> Vec<PortId> {
        self.adapters.iter().filter(|((of, _), _)| *of == vm).map(|(_, port)| *port).collect()
    }
}
