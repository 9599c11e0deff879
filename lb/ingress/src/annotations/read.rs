//! Reading of annotation values: one text in, one typed value out, and a finding where the text is none.

use std::collections::BTreeMap;
use std::time::Duration;

use ipnet::IpNet;
use regex::Regex;

use super::{Finding, Severity, full_name};

/// The annotations of one Ingress while they are read.
pub(super) struct Reader<'a> {
    annotations: &'a BTreeMap<String, String>,
    pub(super) findings: Vec<Finding>,
    /// An annotation that protects the backend cannot be honoured: nobody is let in until it can.
    pub(super) closed: bool,
}

impl<'a> Reader<'a> {
    pub(super) fn new(annotations: &'a BTreeMap<String, String>) -> Self {
        Self { annotations, findings: Vec::new(), closed: false }
    }

    /// The value as it was written, without blanks around it; one that is empty says nothing.
    pub(super) fn text(&self, name: &str) -> Option<&'a str> {
        let text = self.annotations.get(&*full_name(name))?.trim();
        (!text.is_empty()).then_some(text)
    }

    pub(super) fn wrong(&mut self, name: &str, what: impl std::fmt::Display) {
        let value = self.text(name).unwrap_or_default();
        self.findings.push(Finding {
            annotation: name.to_owned(),
            severity: Severity::Invalid,
            message: format!("{value:?} {what}"),
        });
    }

    pub(super) fn differs(&mut self, name: &str, message: impl Into<String>) {
        self.findings.push(Finding {
            annotation: name.to_owned(),
            severity: Severity::NotSupported,
            message: message.into(),
        });
    }

    fn parsed<T>(&mut self, name: &str, what: &str, parse: impl FnOnce(&str) -> Option<T>) -> Option<T> {
        let parsed = parse(self.text(name)?);
        if parsed.is_none() {
            self.wrong(name, what);
        }
        parsed
    }

    /// `true` or `false` (also `on`, `off`, `1`, `0`, `yes`, `no`).
    pub(super) fn flag(&mut self, name: &str, default: bool) -> bool {
        let parsed = self.parsed(name, "is neither \"true\" nor \"false\"; the default is used", |text| {
            match text.to_ascii_lowercase().as_str() {
                "true" | "on" | "1" | "yes" | "t" => Some(true),
                "false" | "off" | "0" | "no" | "f" => Some(false),
                _ => None,
            }
        });
        parsed.unwrap_or(default)
    }

    pub(super) fn number(&mut self, name: &str, least: u32, most: u32) -> Option<u32> {
        let what = format!("is no whole number from {least} to {most}; the default is used");
        self.parsed(name, &what, |text| text.parse().ok().filter(|number| (least..=most).contains(number)))
    }

    /// Whole seconds without a unit; one with the unit `s` is what nginx itself would take.
    pub(super) fn seconds(&mut self, name: &str) -> Option<Duration> {
        let parse = |text: &str| {
            let digits = text.strip_suffix('s').unwrap_or(text);
            digits.parse::<u32>().ok().map(|seconds| Duration::from_secs(seconds.into()))
        };
        self.parsed(name, "is no number of seconds, such as 60; the default is used", parse)
    }

    /// Bytes with nginx's units k, m and g.
    pub(super) fn bytes(&mut self, name: &str) -> Option<u64> {
        self.parsed(name, "is no size such as 512k, 10m or 1g; the default is used", size)
    }

    /// A word of a closed set, in any case.
    pub(super) fn word<T: Copy>(&mut self, name: &str, words: &[(&str, T)]) -> Option<T> {
        let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        let what = format!("is none of {}; the default is used", known.join(", "));
        self.parsed(name, &what, |text| {
            words.iter().find(|(word, _)| word.eq_ignore_ascii_case(text)).map(|(_, value)| *value)
        })
    }

    pub(super) fn status(&mut self, name: &str, least: u16, most: u16) -> Option<u16> {
        self.number(name, least.into(), most.into()).and_then(|code| u16::try_from(code).ok())
    }

    /// An expression that this program can run.
    pub(super) fn pattern(&mut self, name: &str) -> Option<String> {
        let text = self.text(name)?;
        match Regex::new(text) {
            Ok(_) => Some(text.to_owned()),
            Err(error) => {
                let why = error.to_string();
                let why = why.lines().last().unwrap_or("unreadable").trim().to_owned();
                self.wrong(name, format!("is no regular expression that can be run ({why}); correct it"));
                None
            }
        }
    }

    pub(super) fn list(&self, name: &str) -> Vec<String> {
        let items = self.text(name).unwrap_or_default().split(',').map(str::trim);
        items.filter(|item| !item.is_empty()).map(str::to_owned).collect()
    }

    /// CIDRs or addresses. One that cannot be read closes the route: a list that protects must not lose an entry.
    pub(super) fn ranges(&mut self, name: &str) -> Option<Vec<IpNet>> {
        self.text(name)?;
        let mut ranges = Vec::new();
        for item in self.list(name) {
            match range(&item) {
                Some(range) => ranges.push(range),
                None => {
                    self.wrong(
                        name,
                        format!("holds {item:?}, which is no CIDR; nobody is let in until it is corrected"),
                    );
                    self.closed = true;
                }
            }
        }
        Some(ranges)
    }

    /// Names of headers; one that is none is left out.
    pub(super) fn header_names(&mut self, name: &str) -> Vec<String> {
        let (good, bad): (Vec<_>, Vec<_>) = self.list(name).into_iter().partition(|item| is_token(item));
        for item in bad {
            self.wrong(name, format!("holds {item:?}, which is no header name; it is left out"));
        }
        good
    }

    pub(super) fn url(&mut self, name: &str) -> Option<String> {
        let parse = |text: &str| {
            let rest = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"))?;
            let host = rest.split('/').next().unwrap_or_default();
            (!host.is_empty() && !is_unsafe(text)).then(|| text.to_owned())
        };
        self.parsed(name, "is no URL such as https://auth.example.com/check", parse)
    }

    /// Text that goes into a header.
    pub(super) fn header_value(&mut self, name: &str) -> Option<String> {
        self.parsed(name, "holds control characters; remove them", |text| {
            (!is_unsafe(text)).then(|| text.to_owned())
        })
    }
}

/// Bytes with nginx's units; `None` for anything else.
pub(super) fn size(text: &str) -> Option<u64> {
    let text = text.trim().to_ascii_lowercase();
    let (digits, unit) = match text.as_bytes().last()? {
        b'k' => (&text[..text.len() - 1], 1u64 << 10),
        b'm' => (&text[..text.len() - 1], 1 << 20),
        b'g' => (&text[..text.len() - 1], 1 << 30),
        _ => (text.as_str(), 1),
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

fn range(text: &str) -> Option<IpNet> {
    let address = || text.parse().ok().map(|address: std::net::IpAddr| IpNet::from(address));
    text.parse::<IpNet>().ok().map(|range| range.trunc()).or_else(address)
}

/// RFC 9110, section 5.6.2.
pub(super) fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

fn is_unsafe(text: &str) -> bool {
    text.bytes().any(|b| b < 0x20 || b == 0x7f)
}
