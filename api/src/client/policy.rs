// SPDX-License-Identifier: Apache-2.0

//! Calls about switches, port groups, ports, decisions and events.

use std::collections::VecDeque;

use http_body_util::BodyExt;
use hyper::{Method, StatusCode, body::Incoming};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::{Call, Client, ClientError, segment};
use crate::{Put, types::*};

/// The most bytes that one event may have.
const MAX_EVENT: usize = 1 << 20;

impl Client {
    /// `GET /v1/switches`.
    pub async fn list_switches(&self) -> Result<Vec<Switch>, ClientError> {
        self.list("/v1/switches").await
    }

    /// `GET /v1/switches/{name}`.
    pub async fn get_switch(&self, switch: &str) -> Result<Switch, ClientError> {
        self.read(Call::get(format!("/v1/switches/{}", segment(switch)))).await
    }

    /// `PUT /v1/switches/{name}`, only at this revision if there is one.
    pub async fn put_switch(
        &self,
        switch: &str,
        spec: &SwitchSpec,
        if_match: Option<u64>,
    ) -> Result<Put<Switch>, ClientError> {
        self.put(format!("/v1/switches/{}", segment(switch)), spec, if_match).await
    }

    /// `DELETE /v1/switches/{name}`, only at this revision if there is one.
    pub async fn delete_switch(&self, switch: &str, if_match: Option<u64>) -> Result<(), ClientError> {
        let call = Call::new(Method::DELETE, format!("/v1/switches/{}", segment(switch)));
        self.send(&Call { if_match, ..call }).await.map(drop)
    }

    /// `GET /v1/port-groups`.
    pub async fn list_port_groups(&self) -> Result<Vec<PortGroup>, ClientError> {
        self.list("/v1/port-groups").await
    }

    /// `GET /v1/port-groups/{name}`.
    pub async fn get_port_group(&self, group: &str) -> Result<PortGroup, ClientError> {
        self.read(Call::get(format!("/v1/port-groups/{}", segment(group)))).await
    }

    /// `PUT /v1/port-groups/{name}`, only at this revision if there is one.
    pub async fn put_port_group(
        &self,
        group: &str,
        spec: &PortGroupSpec,
        if_match: Option<u64>,
    ) -> Result<Put<PortGroup>, ClientError> {
        self.put(format!("/v1/port-groups/{}", segment(group)), spec, if_match).await
    }

    /// `PATCH /v1/port-groups/{name}` with a JSON merge patch of the specification.
    pub async fn patch_port_group(
        &self,
        group: &str,
        patch: &Value,
        if_match: Option<u64>,
    ) -> Result<PortGroup, ClientError> {
        self.patch(format!("/v1/port-groups/{}", segment(group)), patch, if_match).await
    }

    /// `DELETE /v1/port-groups/{name}`, only at this revision if there is one.
    pub async fn delete_port_group(&self, group: &str, if_match: Option<u64>) -> Result<(), ClientError> {
        let call = Call::new(Method::DELETE, format!("/v1/port-groups/{}", segment(group)));
        self.send(&Call { if_match, ..call }).await.map(drop)
    }

    /// `GET /v1/ports`.
    pub async fn list_ports(&self) -> Result<Vec<Port>, ClientError> {
        self.list("/v1/ports").await
    }

    /// `GET /v1/ports/{id}`: an id, or a name such as `web1/eth0`.
    pub async fn get_port(&self, port: &str) -> Result<Port, ClientError> {
        self.read(Call::get(format!("/v1/ports/{}", segment(port)))).await
    }

    /// `PATCH /v1/ports/{id}` with a JSON merge patch of the specification.
    pub async fn patch_port(
        &self,
        port: &str,
        patch: &Value,
        if_match: Option<u64>,
    ) -> Result<Port, ClientError> {
        self.patch(format!("/v1/ports/{}", segment(port)), patch, if_match).await
    }

    /// `GET /v1/decisions`: as many decisions as the filter's limit, from several pages if necessary.
    pub async fn decisions(&self, filter: &DecisionFilter) -> Result<Vec<Decision>, ClientError> {
        let (mut part, mut decisions) = (filter.clone(), Vec::new());
        let wanted = usize::try_from(filter.limit).unwrap_or(usize::MAX);
        loop {
            let left = wanted.saturating_sub(decisions.len());
            part.limit = u32::try_from(left).unwrap_or(MAX_PAGE).min(MAX_PAGE);
            let call = Call::get("/v1/decisions".to_owned());
            let query =
                serde_urlencoded::to_string(&part).map_err(|error| call.strange(error.to_string()))?;
            let page = self.page::<Decision>(&format!("/v1/decisions?{query}")).await?;
            let none = page.items.is_empty();
            decisions.extend(page.items);
            part.cursor = page.next;
            if none || part.cursor.is_none() || decisions.len() >= wanted {
                return Ok(decisions);
            }
        }
    }

    /// `GET /v1/events`: the events after the event of this id, or from now on without one.
    pub async fn events(&self, after: Option<u64>) -> Result<Events, ClientError> {
        let call = Call { last_event: after, ..Call::get("/v1/events".to_owned()) };
        let body = self.send(&call).await?.into_body();
        Ok(Events { client: self.clone(), call, body, line: Vec::new(), ready: VecDeque::new() })
    }

    async fn put<T: DeserializeOwned>(
        &self,
        path: String,
        spec: &impl Serialize,
        if_match: Option<u64>,
    ) -> Result<Put<T>, ClientError> {
        let call = Call { if_match, ..Call::new(Method::PUT, path).json(spec)? };
        let response = self.send(&call).await?;
        let created = response.status() == StatusCode::CREATED;
        Ok(Put { object: self.parse(&call, response).await?, created })
    }

    async fn patch<T: DeserializeOwned>(
        &self,
        path: String,
        patch: &Value,
        if_match: Option<u64>,
    ) -> Result<T, ClientError> {
        let call = Call::new(Method::PATCH, path).json(patch)?;
        self.read(Call { kind: Some("application/merge-patch+json"), if_match, ..call }).await
    }
}

/// Events as they arrive.
pub struct Events {
    client: Client,
    call: Call,
    body: Incoming,
    /// The line received so far.
    line: Vec<u8>,
    ready: VecDeque<Event>,
}

impl Events {
    /// The next event; None when the agent ends the stream. Call `events` again with the last event's id then.
    pub async fn next(&mut self) -> Result<Option<Event>, ClientError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            let Some(frame) = self.body.frame().await else { return Ok(None) };
            let frame = frame.map_err(|source| self.client.broken(source))?;
            for byte in frame.data_ref().into_iter().flatten() {
                self.take(*byte)?;
            }
        }
    }

    /// Takes a byte of the stream. This API writes the data of each event on one line, with id and kind in it;
    /// comments only keep the connection open.
    fn take(&mut self, byte: u8) -> Result<(), ClientError> {
        if byte != b'\n' {
            self.line.push(byte);
            return if self.line.len() > MAX_EVENT {
                Err(self.call.strange("an event without end"))
            } else {
                Ok(())
            };
        }
        let line = std::mem::take(&mut self.line);
        if let Some(data) = line.strip_prefix(b"data:") {
            let event = serde_json::from_slice(data).map_err(|error| self.call.strange(error.to_string()))?;
            self.ready.push_back(event);
        }
        Ok(())
    }
}
