// SPDX-License-Identifier: Apache-2.0

//! Leases of VMs.

use http_body_util::BodyExt as _;
use hyper::{Method, body::Incoming};
use tokio::time::timeout;
use uuid::Uuid;

use super::{Call, Client, ClientError, segment};
use crate::{
    router::LEASE_BEAT,
    types::{Vm, VmSpec},
};

impl Client {
    /// `POST /v1/vms?leased=true`: the VM is deleted unless [`Client::lease_vm`], with the same holder, comes within 60 s.
    pub async fn create_leased_vm(&self, spec: &VmSpec, holder: Option<Uuid>) -> Result<Vm, ClientError> {
        let holder = holder.map(|holder| format!("&holder={holder}")).unwrap_or_default();
        self.read(Call::new(Method::POST, format!("/v1/vms?leased=true{holder}")).json(spec)?).await
    }

    /// `POST /v1/vms/{name}/lease`: the VM is deleted when the lease is dropped, or this process ends.
    /// With a `holder` the lease is that of one client, which has drawn the id.
    pub async fn lease_vm(&self, vm: &str, holder: Option<Uuid>) -> Result<Lease, ClientError> {
        let holder = holder.map(|holder| format!("?holder={holder}")).unwrap_or_default();
        let call = Call::new(Method::POST, format!("/v1/vms/{}/lease{holder}", segment(vm)));
        let response = self.send(&call).await?;
        Ok(Lease { body: response.into_body(), client: self.clone() })
    }

    /// `DELETE /v1/vms/{name}/lease`: the VM lives on without one.
    pub async fn end_lease(&self, vm: &str) -> Result<(), ClientError> {
        self.send(&Call::new(Method::DELETE, format!("/v1/vms/{}/lease", segment(vm)))).await.map(drop)
    }
}

/// The lease of a VM, which is deleted when it is dropped.
#[derive(Debug)]
pub struct Lease {
    body: Incoming,
    client: Client,
}

impl Lease {
    /// Completes when the lease has ended: the VM is gone, or lives on without a lease.
    ///
    /// # Errors
    /// The agent is gone. Take the lease again when it is back: the VM waits for that for 60 s.
    pub async fn ended(&mut self) -> Result<(), ClientError> {
        let silence = LEASE_BEAT.saturating_mul(3);
        loop {
            let Ok(frame) = timeout(silence, self.body.frame()).await else {
                return Err(ClientError::TimedOut { agent: self.client.agent.to_string(), waited: silence });
            };
            match frame {
                None => return Ok(()),
                Some(frame) => drop(frame.map_err(|source| self.client.broken(source))?),
            }
        }
    }
}
