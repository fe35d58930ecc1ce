use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        RootCertStore, ServerConfig,
        crypto::aws_lc_rs,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
        server::WebPkiClientVerifier,
    },
};

/// How connections are encrypted, and who may open them. The files are read once, at the start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenerTls {
    /// The listener's certificate and those between it and its root, in PEM.
    pub certificates: PathBuf,
    /// The key of the first of them, in PEM.
    pub key: PathBuf,
    /// The roots of the certificates that peers must show, in PEM. Without it peers need none.
    pub client_roots: Option<PathBuf>,
}

/// Why TLS cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file cannot be read.
    #[error("the TLS file {path} cannot be read: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("the TLS file {path} holds no usable {wanted}: {reason}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        wanted: &'static str,
        /// What is wrong.
        reason: String,
    },
}

impl ListenerTls {
    pub(super) fn acceptor(&self) -> Result<TlsAcceptor, TlsError> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let clients = self.client_roots.as_ref().map(|path| {
            let unusable = |reason: String| content(path, "root certificate", reason);
            let mut roots = RootCertStore::empty();
            for root in certificates(path)? {
                roots.add(root).map_err(|error| unusable(error.to_string()))?;
            }
            WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone())
                .build()
                .map_err(|error| unusable(error.to_string()))
        });
        let clients = clients.transpose()?.unwrap_or_else(WebPkiClientVerifier::no_client_auth);
        let chain = certificates(&self.certificates)?;
        let key = PrivateKeyDer::from_pem_slice(&read(&self.key)?)
            .map_err(|error| content(&self.key, "private key", error.to_string()))?;
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .and_then(|config| {
                config.with_client_cert_verifier(clients).with_single_cert(chain, key)
            })
            .map_err(|error| content(&self.certificates, "certificate", error.to_string()))?;
        Ok(Arc::new(config).into())
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let pem = read(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let found = found.map_err(|error| content(path, "certificate", error.to_string()))?;
    match found.is_empty() {
        true => Err(content(path, "certificate", "there is none in PEM".to_owned())),
        false => Ok(found),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Read { path: path.to_owned(), source })
}

fn content(path: &Path, wanted: &'static str, reason: String) -> TlsError {
    TlsError::Content { path: path.to_owned(), wanted, reason }
}
