//! Why the API server cannot be used: an error of the client in, its kind and one sentence with the remedy out. Pure.

use std::error::Error;
use std::fmt;
use std::io;

use kube::client::AuthError;
use kube::core::Status;
use kube::runtime::watcher;

use super::client::Endpoint;

/// What to run when a right is missing.
pub(super) const GRANT: &str = "grant it with 'weft manifests | kubectl apply -f -'";

/// The kinds that have different remedies, the one that explains most first; each with what was said on one line.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ApiFailure {
    /// The server's certificate was not accepted.
    Untrusted { why: Distrust, said: String },
    /// 401, or a token that no request can carry.
    Unauthenticated(String),
    /// 403; the message names verb and resource.
    Forbidden(String),
    /// No answer: refused, no route, no time, no such name, hung up.
    Unreachable(String),
    /// An answer that is of no use.
    Refused(String),
}

/// Why a certificate was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Distrust {
    /// The CA at hand did not sign it.
    Issuer,
    /// It is not for the address that was called.
    Name,
    /// It is not valid now.
    Time,
    /// Anything else.
    Other,
}

impl ApiFailure {
    pub fn of(error: &kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::of_status(status),
            kube::Error::SerdeError(error) => {
                Self::Refused(format!("what it answers is not understood ({error})"))
            }
            _ => Self::of_causes(error),
        }
    }

    pub fn of_watch(error: &watcher::Error) -> Self {
        use watcher::Error as Watch;
        match error {
            Watch::InitialListFailed(error) | Watch::WatchStartFailed(error) | Watch::WatchFailed(error) => {
                Self::of(error)
            }
            Watch::WatchError(status) => Self::of_status(status),
            Watch::NoResourceVersion => Self::Refused(error.to_string()),
        }
    }

    fn of_status(status: &Status) -> Self {
        let said = match (status.message.trim(), status.reason.as_str()) {
            ("", "") => format!("HTTP {}", status.code),
            ("", reason) => reason.to_owned(),
            (message, _) => one_line(message),
        };
        match status.code {
            401 => Self::Unauthenticated(said),
            403 => Self::Forbidden(said),
            code => Self::Refused(format!("it answers {code}: {said}")),
        }
    }

    /// The first cause that tells its kind, else the innermost one's text.
    fn of_causes(error: &kube::Error) -> Self {
        let causes = causes(error);
        for cause in &causes {
            if let Some(tls) = cause.downcast_ref::<rustls::Error>() {
                return Self::of_tls(tls);
            }
            if cause.is::<AuthError>() {
                return Self::Unauthenticated(one_line(&cause.to_string()));
            }
        }
        Self::Unreachable(one_line(&causes.last().map_or_else(|| error.to_string(), ToString::to_string)))
    }

    fn of_tls(error: &rustls::Error) -> Self {
        use rustls::CertificateError as Certificate;
        let why = match error {
            rustls::Error::InvalidCertificate(reason) => match reason {
                Certificate::UnknownIssuer | Certificate::BadSignature => Distrust::Issuer,
                Certificate::NotValidForName | Certificate::NotValidForNameContext { .. } => Distrust::Name,
                Certificate::Expired
                | Certificate::ExpiredContext { .. }
                | Certificate::NotValidYet
                | Certificate::NotValidYetContext { .. } => Distrust::Time,
                _ => Distrust::Other,
            },
            rustls::Error::InvalidMessage(_) => {
                return Self::Refused("it does not speak TLS on that port".to_owned());
            }
            _ => Distrust::Other,
        };
        Self::Untrusted { why, said: one_line(&error.to_string()) }
    }

    /// A silence, which ends by itself when the server is back; all else waits for a person.
    pub fn is_silence(&self) -> bool {
        matches!(self, Self::Unreachable(_))
    }

    /// One line: which server, what is wrong, what to do.
    pub fn sentence(&self, server: &Address) -> String {
        let url = &server.url;
        match self {
            Self::Untrusted { why, said } => {
                format!(
                    "API server {url}: its certificate is not accepted with {} ({said}); {}",
                    server.trust(),
                    server.trust_remedy(*why)
                )
            }
            Self::Unauthenticated(said) => {
                format!(
                    "API server {url}: it does not accept {} ({said}); {}",
                    server.credential(),
                    server.credential_remedy()
                )
            }
            Self::Forbidden(said) => format!("API server {url}: {said}; {GRANT}"),
            Self::Unreachable(said) => {
                format!(
                    "API server {url} cannot be reached ({said}); check that it runs, its address and the network between"
                )
            }
            Self::Refused(said) => {
                format!("API server {url}: {said}; check that a Kubernetes API server is there and healthy")
            }
        }
    }
}

/// A server and the files it is spoken to with, for sentences.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    pub url: String,
    pub endpoint: Endpoint,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.url)
    }
}

impl Address {
    fn trust(&self) -> String {
        match &self.endpoint {
            Endpoint::Kubeconfig(path) => format!("the CA of kubeconfig {}", path.display()),
            Endpoint::Server { ca_file: Some(path), .. } => format!("--ca-file {}", path.display()),
            Endpoint::Server { ca_file: None, .. } => "the CAs of this machine".to_owned(),
        }
    }

    fn trust_remedy(&self, why: Distrust) -> String {
        let (place, address) = match &self.endpoint {
            Endpoint::Kubeconfig(_) => ("into the kubeconfig", "its server:"),
            Endpoint::Server { ca_file: Some(_), .. } => ("there", "--api-server"),
            Endpoint::Server { ca_file: None, .. } => {
                ("into a file and name it with --ca-file", "--api-server")
            }
        };
        match why {
            Distrust::Issuer | Distrust::Other => {
                format!("put the CA that signed the server's certificate {place}")
            }
            Distrust::Name => {
                format!(
                    "give {address} an address that the certificate names, or add this one to the certificate"
                )
            }
            Distrust::Time => "renew the server's certificate, or set this machine's clock".to_owned(),
        }
    }

    fn credential(&self) -> String {
        match &self.endpoint {
            Endpoint::Kubeconfig(path) => format!("the credentials of kubeconfig {}", path.display()),
            Endpoint::Server { token_file: Some(path), .. } => {
                format!("the token of --token-file {}", path.display())
            }
            Endpoint::Server { token_file: None, .. } => "requests without a token".to_owned(),
        }
    }

    fn credential_remedy(&self) -> &'static str {
        match &self.endpoint {
            Endpoint::Kubeconfig(_) => {
                "they expired or are of another cluster: put valid ones there, they are taken at once"
            }
            Endpoint::Server { token_file: Some(_), .. } => {
                "it expired or is of another cluster: the DaemonSet rotates that file, without it put a new token there; it is \
                 taken at once"
            }
            Endpoint::Server { token_file: None, .. } => "give --token-file",
        }
    }
}

/// The error and everything below it. An I/O error hides what it wraps from `source`.
fn causes<'a>(error: &'a (dyn Error + 'static)) -> Vec<&'a (dyn Error + 'static)> {
    let mut found = Vec::new();
    let mut next = Some(error);
    while let Some(cause) = next {
        found.push(cause);
        let wrapped = cause.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        next = match wrapped {
            Some(wrapped) => Some(wrapped),
            None => cause.source(),
        };
    }
    found
}

/// Texts of others may have several lines; a sentence has one.
pub(super) fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests;
