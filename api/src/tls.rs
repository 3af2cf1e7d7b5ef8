// SPDX-License-Identifier: Apache-2.0

//! TLS for the API over TCP: version 1.3, from certificates and keys in PEM.

use std::sync::Arc;

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    version::TLS13,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Why certificates or a key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The text has no certificate.
    #[error("there is no certificate in it (PEM, BEGIN CERTIFICATE)")]
    NoCertificate,
    /// The text has no key.
    #[error("there is no private key in it (PEM, PKCS#8, SEC1 or PKCS#1)")]
    NoKey,
    /// Certificates and key do not fit each other, or are of a kind that TLS 1.3 does not have.
    #[error("the certificates or the key cannot be used")]
    Unusable(#[source] rustls::Error),
}

/// The server's side: its certificate, the ones between it and an authority, and its key.
///
/// # Errors
/// See [`TlsError`].
pub fn acceptor(certificates: &[u8], key: &[u8]) -> Result<TlsAcceptor, TlsError> {
    let certificates = read_certificates(certificates)?;
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| TlsError::NoKey)?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .and_then(|config| config.with_no_client_auth().with_single_cert(certificates, key))
        .map_err(TlsError::Unusable)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config).into())
}

/// The client's side, which trusts these authorities (or these very certificates) and no others.
///
/// # Errors
/// See [`TlsError`].
pub fn connector(authorities: &[u8]) -> Result<TlsConnector, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in read_certificates(authorities)? {
        roots.add(certificate).map_err(TlsError::Unusable)?;
    }
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(TlsError::Unusable)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config).into())
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn read_certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    found.ok().filter(|all| !all.is_empty()).ok_or(TlsError::NoCertificate)
}
