//! What the annotations of ingress-nginx say: text in, [`Settings`] and findings out. Pure.
//!
//! ```text
//!  annotations of one Ingress --parse--> Settings (typed, every default filled in)
//!                                   +--> findings: what is wrong, unknown or not done, each with its remedy
//! ```
//!
//! [`catalog`] lists every annotation there is; nothing passes in silence. What protects a backend and cannot be read closes it
//! (`Settings::closed`); all else falls back to its default.

pub mod catalog;
mod read;
mod settings;

use std::borrow::Cow;
use std::collections::BTreeMap;

use weft_model::Reason;
use weft_model::ingress::ANNOTATION_PREFIX;

pub use settings::{
    Affinity, AffinityCookie, BackendProtocol, BasicAuth, Canary, ClientTls, Cors, ForwardAuth, HttpRedirect,
    Limits, Mirror, Pace, ProxyVersion, Retry, RetryOn, SameSite, Satisfy, Settings, UpstreamTls,
    VerifyClient,
};

use catalog::Support;
use read::Reader;

/// Weft's own annotations begin so.
const OWN_PREFIX: &str = "weft.network/";
/// The only one of them that an Ingress may have.
const PROXY_PROTOCOL: &str = "weft.network/proxy-protocol";

/// ingress-nginx's go without their prefix here, others by their whole name.
fn full_name(name: &str) -> Cow<'_, str> {
    match name.contains('/') {
        true => name.into(),
        false => format!("{ANNOTATION_PREFIX}{name}").into(),
    }
}

/// What there is to say about one annotation.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// Without the prefix of ingress-nginx.
    pub annotation: String,
    pub severity: Severity,
    /// What is wrong and what to do, as the rest of a sentence that begins with the annotation.
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// It works, with a difference that one should know.
    Note,
    /// No such annotation exists.
    Unknown,
    /// It exists, and this program does not do it.
    NotSupported,
    /// Its value cannot be used.
    Invalid,
}

impl Severity {
    /// The reason code of a Problem; a note is none.
    pub fn reason(self) -> Option<Reason> {
        match self {
            Self::Note => None,
            Self::Unknown | Self::NotSupported => Some(Reason::NotSupported),
            Self::Invalid => Some(Reason::InvalidField),
        }
    }
}

impl Finding {
    /// The whole sentence.
    pub fn sentence(&self) -> String {
        format!("annotation {} {}", full_name(&self.annotation), self.message)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parsed {
    pub settings: Settings,
    /// Sorted.
    pub findings: Vec<Finding>,
}

/// Reads all annotations of one Ingress.
pub fn parse(annotations: &BTreeMap<String, String>) -> Parsed {
    let mut reader = Reader::new(annotations);
    let settings = settings::read(&mut reader);
    let mut findings = reader.findings;
    let names = || annotations.keys().filter_map(|key| key.strip_prefix(ANNOTATION_PREFIX));
    match settings.ssl_passthrough {
        false => findings.extend(names().filter_map(of_name)),
        true => {
            findings.extend(names().filter(|name| catalog::find(name).is_none()).filter_map(of_name));
            findings.extend(passed_over(annotations));
        }
    }
    let own = annotations.keys().filter(|key| key.starts_with(OWN_PREFIX) && *key != PROXY_PROTOCOL);
    findings.extend(own.map(|key| Finding {
        annotation: key.clone(),
        severity: Severity::Unknown,
        message: format!(
            "does not exist for an Ingress and changes nothing: the only one is {PROXY_PROTOCOL}"
        ),
    }));
    findings.sort();
    Parsed { settings, findings }
}

/// What `ssl-passthrough` makes of those beside it: nothing, but for those that say what happens anyway.
fn passed_over(annotations: &BTreeMap<String, String>) -> Option<Finding> {
    let agrees = |name: &str, value: &str| match name {
        "ssl-passthrough" | "backend-protocol" => true,
        "ssl-redirect" | "force-ssl-redirect" => value != "false",
        _ => false,
    };
    let named =
        annotations.iter().filter_map(|(key, value)| Some((key.strip_prefix(ANNOTATION_PREFIX)?, value)));
    let lost: Vec<&str> = named
        .filter(|(name, value)| catalog::find(name).is_some() && !agrees(name, value))
        .map(|(name, _)| name)
        .collect();
    (!lost.is_empty()).then(|| Finding {
        annotation: "ssl-passthrough".to_owned(),
        severity: Severity::NotSupported,
        message: format!(
            "passes TLS on as it is, so what reads or changes requests does nothing beside it: remove {}, or end TLS here \
             without ssl-passthrough",
            lost.join(", ")
        ),
    })
}

/// What its name alone says, whatever the value.
fn of_name(name: &str) -> Option<Finding> {
    let finding = |severity, message| Some(Finding { annotation: name.to_owned(), severity, message });
    match catalog::find(name).map(|known| known.support) {
        Some(Support::Same | Support::Needless(_)) => None,
        Some(Support::Differs(note)) => finding(Severity::Note, format!("works with a difference: {note}")),
        Some(Support::Not(instead)) => {
            finding(Severity::NotSupported, format!("is not supported and changes nothing: {instead}"))
        }
        None => {
            let hint = match catalog::nearest(name) {
                Some(real) => format!("the nearest real one is {ANNOTATION_PREFIX}{real}"),
                None => "remove it, or look its name up in docs/ingress.md".to_owned(),
            };
            finding(Severity::Unknown, format!("does not exist and changes nothing: {hint}"))
        }
    }
}

#[cfg(test)]
mod tests;
