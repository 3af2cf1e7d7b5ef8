// SPDX-License-Identifier: Apache-2.0

//! An agent that listens on TCP.

use std::{fmt, io, net::IpAddr};

use axum::http::{HeaderValue, Uri};
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::{ClientError, Stream};
use crate::{
    tls::{self, TlsError},
    token::Tokens,
};

/// Why an address cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The URL is not an agent's address.
    #[error("{0} is not an agent's address: write https://HOST:PORT, or http://HOST:PORT on this host")]
    NotAUrl(String),
    /// The token would cross a network without encryption.
    #[error(
        "{0} has no TLS, so the token would cross the network in clear text: use https, or an address of \
         this host"
    )]
    Clear(String),
    /// An `https` address without certificates of authorities that could vouch for the agent.
    #[error("{0} needs the certificates of the authorities that vouch for it: name them with --ca-file")]
    NoAuthority(String),
    /// The certificates of the authorities cannot be used.
    #[error("The certificates of the authorities cannot be used")]
    Tls(#[source] TlsError),
}

/// An agent's address, with credentials and TLS for it.
pub struct Remote {
    url: String,
    /// The Host header.
    authority: HeaderValue,
    host: String,
    port: u16,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    credentials: HeaderValue,
}

impl Remote {
    /// A `Remote` for the agent at `url`, with the first of these tokens. Over `https`, one of these
    /// authorities (PEM) must have issued the agent's certificate.
    ///
    /// # Errors
    /// See [`RemoteError`].
    pub fn new(url: &str, tokens: &Tokens, authorities: Option<&[u8]>) -> Result<Self, RemoteError> {
        let wrong = || RemoteError::NotAUrl(url.to_owned());
        let uri: Uri = url.parse().map_err(|_| wrong())?;
        let authority =
            uri.authority().filter(|authority| !authority.as_str().contains('@')).ok_or_else(wrong)?;
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(wrong());
        }
        let host = authority.host();
        let host = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host).to_owned();
        let (tls, usual) = match uri.scheme_str() {
            Some("https") => {
                let authorities = authorities.ok_or_else(|| RemoteError::NoAuthority(url.to_owned()))?;
                let connector = tls::connector(authorities).map_err(RemoteError::Tls)?;
                (Some((connector, ServerName::try_from(host.clone()).map_err(|_| wrong())?)), 443)
            }
            Some("http") if is_loopback(&host) => (None, 80),
            Some("http") => return Err(RemoteError::Clear(url.to_owned())),
            _ => return Err(wrong()),
        };
        let mut credentials =
            HeaderValue::try_from(format!("Bearer {}", tokens.first())).map_err(|_| wrong())?;
        credentials.set_sensitive(true);
        Ok(Remote {
            url: url.to_owned(),
            authority: HeaderValue::try_from(authority.as_str()).map_err(|_| wrong())?,
            host,
            port: authority.port_u16().unwrap_or(usual),
            tls,
            credentials,
        })
    }

    pub(super) fn url(&self) -> &str {
        &self.url
    }

    pub(super) fn host_header(&self) -> HeaderValue {
        self.authority.clone()
    }

    pub(super) fn credentials(&self) -> HeaderValue {
        self.credentials.clone()
    }

    pub(super) async fn connect(&self) -> Result<Box<dyn Stream>, ClientError> {
        let failed = |source: io::Error| ClientError::Unreachable { url: self.url.clone(), source };
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await.map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        match &self.tls {
            None => Ok(Box::new(stream)),
            Some((tls, name)) => Ok(Box::new(tls.connect(name.clone(), stream).await.map_err(failed)?)),
        }
    }
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Remote").field(&self.url).finish()
    }
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}
