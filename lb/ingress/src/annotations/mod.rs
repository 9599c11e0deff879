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

use std::collections::BTreeMap;

use weft_model::Reason;
use weft_model::ingress::ANNOTATION_PREFIX;

pub use settings::{
    Affinity, AffinityCookie, BackendProtocol, BasicAuth, Canary, ClientTls, Cors, ForwardAuth, HttpRedirect,
    Limits, Mirror, Pace, Retry, RetryOn, SameSite, Satisfy, Settings, UpstreamTls, VerifyClient,
};

use catalog::Support;
use read::Reader;

/// What there is to say about one annotation.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// Without the prefix.
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
        format!("annotation {ANNOTATION_PREFIX}{} {}", self.annotation, self.message)
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
    findings.extend(names(annotations).filter_map(of_name));
    findings.sort();
    Parsed { settings, findings }
}

fn names(annotations: &BTreeMap<String, String>) -> impl Iterator<Item = &str> {
    annotations.keys().filter_map(|key| key.strip_prefix(ANNOTATION_PREFIX))
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
