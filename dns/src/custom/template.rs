//! CoreDNS's `template`: records made from the name that was asked for. Pure.
//!
//! Of Go's text templates the fields are understood, not its language: `{{ .Name }}`, `.Type`, `.Class`, `.Zone`,
//! `.Group.NAME` and `index .Match N`.

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::{DNSClass, Name as WireName, Record, RecordType};
use hickory_proto::serialize::txt::Parser;

use super::Pattern;
use crate::name::Name;

/// Of a record that names no TTL itself, in seconds (CoreDNS's own).
const DEFAULT_TTL_SECONDS: u32 = 3600;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Template {
    /// `None` is ANY: every type.
    pub(crate) record_type: Option<RecordType>,
    /// Names in none of these are not made here.
    pub(crate) zones: Vec<Name>,
    /// Any of them; none matches every name.
    pub(crate) matches: Vec<Pattern>,
    pub(crate) answers: Vec<Text>,
    pub(crate) authorities: Vec<Text>,
    pub(crate) code: ResponseCode,
    /// Names that match nothing are looked up further.
    pub(crate) falls_through: bool,
}

/// A text with fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Text(Vec<Piece>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Plain(String),
    Name,
    Type,
    Class,
    Zone,
    Group(String),
    Match(usize),
}

impl Text {
    /// Errors: the field that is not understood.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some((before, behind)) = rest.split_once("{{") {
            let (field, after) = behind.split_once("}}").ok_or("{{ without }}")?;
            pieces.push(Piece::Plain(before.to_owned()));
            pieces.push(field_of(field.trim().trim_matches('-').trim())?);
            rest = after;
        }
        pieces.push(Piece::Plain(rest.to_owned()));
        Ok(Self(pieces))
    }

    fn fill(&self, made: &Made<'_>) -> String {
        let piece = |piece: &Piece| match piece {
            Piece::Plain(text) => text.clone(),
            Piece::Name => made.name.to_owned(),
            Piece::Type => made.record_type.to_string(),
            Piece::Class => "IN".to_owned(),
            Piece::Zone => made.zone.to_string(),
            Piece::Group(name) => made.group(|found| found.name(name)),
            Piece::Match(number) => made.group(|found| found.get(*number)),
        };
        self.0.iter().map(piece).collect()
    }
}

fn field_of(field: &str) -> Result<Piece, String> {
    match field {
        ".Name" | ".Question.Name" => Ok(Piece::Name),
        ".Type" => Ok(Piece::Type),
        ".Class" => Ok(Piece::Class),
        ".Zone" => Ok(Piece::Zone),
        _ => {
            let group = field.strip_prefix(".Group.").map(|name| Piece::Group(name.to_owned()));
            let number = field.strip_prefix("index .Match ").and_then(|number| number.trim().parse().ok());
            group.or(number.map(Piece::Match)).ok_or_else(|| format!("{{{{ {field} }}}}"))
        }
    }
}

/// What a text is filled from.
struct Made<'a> {
    name: &'a str,
    record_type: RecordType,
    zone: &'a Name,
    found: Option<regex::Captures<'a>>,
}

impl<'a> Made<'a> {
    fn group(&self, pick: impl FnOnce(&regex::Captures<'a>) -> Option<regex::Match<'a>>) -> String {
        self.found.as_ref().and_then(pick).map(|found| found.as_str().to_owned()).unwrap_or_default()
    }
}

/// What a template makes of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Making {
    /// Looked up further.
    Passed,
    Made {
        code: ResponseCode,
        answers: Vec<Record>,
        authorities: Vec<Record>,
    },
}

impl Template {
    pub(crate) fn answer(&self, name: &Name, record_type: RecordType) -> Making {
        let zone = self.zones.iter().filter(|zone| name.is_in(zone)).max_by_key(|zone| zone.wire().len());
        let Some(zone) = zone.filter(|_| self.record_type.is_none_or(|own| own == record_type)) else {
            return Making::Passed;
        };
        let text = name.to_string();
        let found = self.matches.iter().find_map(|pattern| pattern.0.captures(&text));
        if !self.matches.is_empty() && found.is_none() {
            return match self.falls_through {
                true => Making::Passed,
                false => Making::Made {
                    code: ResponseCode::NXDomain,
                    answers: Vec::new(),
                    authorities: Vec::new(),
                },
            };
        }
        let made = Made { name: &text, record_type, zone, found };
        let records =
            |texts: &[Text]| texts.iter().map(|text| record(&text.fill(&made))).collect::<Option<Vec<_>>>();
        match (records(&self.answers), records(&self.authorities)) {
            (Some(answers), Some(authorities)) => Making::Made { code: self.code, answers, authorities },
            _ => {
                tracing::debug!(name = %text, "a template made no record");
                Making::Made { code: ResponseCode::ServFail, answers: Vec::new(), authorities: Vec::new() }
            }
        }
    }
}

/// One record in the words of a zone file.
pub(super) fn record(line: &str) -> Option<Record> {
    let line = line.replace(['\n', '\r'], " ");
    if line.trim_start().starts_with('$') {
        return None;
    }
    let text = format!("$TTL {DEFAULT_TTL_SECONDS}\n{line}\n");
    let (_, sets) = Parser::new(text, None, Some(WireName::root())).parse().ok()?;
    let mut records = sets.values().flat_map(|set| set.records_without_rrsigs());
    let record = records.next().filter(|record| record.dns_class == DNSClass::IN)?;
    records.next().is_none().then(|| record.clone())
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;
    use regex::Regex;

    use super::*;

    fn template(answer: &str) -> Template {
        Template {
            record_type: None,
            zones: vec![Name::root()],
            matches: vec![Pattern(Regex::new("^(?P<first>[^.]*)").unwrap())],
            answers: vec![Text::parse(answer).unwrap()],
            authorities: Vec::new(),
            code: ResponseCode::NoError,
            falls_through: false,
        }
    }

    #[test]
    fn fields_that_are_not_understood_are_named() {
        assert_eq!(Text::parse("{{ range .Foo }} IN A"), Err("{{ range .Foo }}".to_owned()));
        assert_eq!(Text::parse("{{ .Name"), Err("{{ without }}".to_owned()));
        assert!(Text::parse("{{- .Name -}} 60 IN A 192.0.2.1").is_ok());
    }

    #[test]
    fn a_line_that_is_no_single_record_makes_a_failure() {
        for line in ["", "nonsense", "$ORIGIN example.org.", "a. CH A 192.0.2.1"] {
            let made = template(line).answer(&Name::parse("a.example").unwrap(), RecordType::A);
            let failed = matches!(&made, Making::Made { code: ResponseCode::ServFail, answers, .. } if answers.is_empty());
            assert!(failed, "{line:?}: {made:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

        /// Pods choose the names.
        #[test]
        fn a_name_of_any_octets_makes_a_record_of_that_name_or_none(
            labels in prop::collection::vec(
                prop_oneof![
                    prop::collection::vec(any::<u8>(), 1..12),
                    prop::collection::vec(prop::sample::select(b"()@$*;\\\".- \t\n0".to_vec()), 1..6),
                ],
                1..5,
            ),
        ) {
            static TEMPLATES: LazyLock<[Template; 3]> = LazyLock::new(|| {
                ["{{ .Name }} 60 IN A 192.0.2.1", "{{ .Name }} IN TXT {{ .Group.first }}", "x. 60 IN CNAME {{ .Name }}"]
                    .map(template)
            });
            let name = Name::from_labels(labels.iter().map(Vec::as_slice)).unwrap();
            for template in TEMPLATES.iter() {
                if let Making::Made { answers, .. } = template.answer(&name, RecordType::A) {
                    prop_assert!(answers.len() <= 1);
                }
            }
        }
    }
}
