//! TLS for registries: the system's CAs, further ones by registry, this client's own certificate where a registry wants
//! one. A certificate is not checked only where the person said so.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use super::error::RegistryError;

/// What the folders of certificates hold for one registry.
#[derive(Debug, Default)]
pub(super) struct Certificates {
    cas: Vec<CertificateDer<'static>>,
    client: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
}

impl Certificates {
    /// For `domain` (`host:port`, as references name it), from all folders that have something for it.
    pub(super) fn read(folders: &[PathBuf], domain: &str) -> Result<Self, RegistryError> {
        let mut certificates = Self::default();
        for folder in folders {
            certificates.add_folder(&folder.join(domain))?;
        }
        Ok(certificates)
    }

    fn add_folder(&mut self, folder: &Path) -> Result<(), RegistryError> {
        let Ok(entries) = fs::read_dir(folder) else { return Ok(()) };
        let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        files.sort();
        for file in files {
            match file.extension().and_then(|extension| extension.to_str()) {
                Some("crt") => self.cas.extend(certificates(&file)?),
                Some("cert") => {
                    let key = file.with_extension("key");
                    let read = PrivateKeyDer::from_pem_file(&key);
                    let key = read.map_err(|source| bad(&key, source))?;
                    self.client = Some((certificates(&file)?, key));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, RegistryError> {
    let read = CertificateDer::pem_file_iter(path).map_err(|source| bad(path, source))?;
    read.collect::<Result<_, _>>().map_err(|source| bad(path, source))
}

fn bad(path: &Path, source: impl Into<super::error::Source>) -> RegistryError {
    RegistryError::Certificate { path: path.to_owned(), source: source.into() }
}

/// TLS to one registry, and to others that it leads to.
#[derive(Debug)]
pub(super) struct TlsConfigs {
    pub(super) own: ClientConfig,
    /// Without this client's certificate.
    pub(super) others: ClientConfig,
}

impl TlsConfigs {
    pub(super) fn new(certificates: Certificates, is_insecure: bool) -> Result<Self, RegistryError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = system_roots().clone();
        for ca in certificates.cas {
            roots.add(ca)?;
        }
        let builder = || {
            let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
                .with_safe_default_protocol_versions()?;
            Ok::<_, rustls::Error>(match is_insecure {
                true => builder
                    .dangerous()
                    .with_custom_certificate_verifier(Arc::new(AnyCertificate(Arc::clone(&provider)))),
                false => builder.with_root_certificates(roots.clone()),
            })
        };
        let others = builder()?.with_no_client_auth();
        let own = match certificates.client {
            Some((chain, key)) => builder()?.with_client_auth_cert(chain, key)?,
            None => others.clone(),
        };
        Ok(Self { own, others })
    }
}

/// The system's CAs; Mozilla's where the system has none at all.
fn system_roots() -> &'static RootCertStore {
    static ROOTS: OnceLock<RootCertStore> = OnceLock::new();
    ROOTS.get_or_init(|| {
        let found = rustls_native_certs::load_native_certs();
        for error in &found.errors {
            tracing::warn!(%error, "some of the system's certificates cannot be read");
        }
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(found.certs);
        if roots.is_empty() {
            tracing::warn!("the system has no CA certificates; the built-in ones are used");
            roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        }
        roots
    })
}

/// Believes any certificate, for registries that the person marked insecure. What the other end signs is checked against
/// the certificate that it shows.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
