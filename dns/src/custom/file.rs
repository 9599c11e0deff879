//! A zone file (RFC 1035 section 5) that stands in the ConfigMap, and answers from it. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use hickory_proto::rr::{Name as WireName, Record, RecordType};
use hickory_proto::serialize::txt::Parser;

use crate::name::Name;

/// Aliases followed within the file.
const MAX_ALIASES: usize = 8;

/// Two are equal when they are of one text.
#[derive(Clone, Debug)]
pub(crate) struct ZoneFile {
    pub(crate) origin: Name,
    text: Arc<str>,
    /// Records by name.
    names: Arc<BTreeMap<Name, Vec<Record>>>,
}

impl PartialEq for ZoneFile {
    fn eq(&self, other: &Self) -> bool {
        self.origin == other.origin && self.text == other.text
    }
}

impl Eq for ZoneFile {}

/// What a file says about a name and type.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FromFile {
    pub(crate) answers: Vec<Record>,
    /// The SOA, of a negative answer.
    pub(crate) authorities: Vec<Record>,
    pub(crate) name_error: bool,
    /// Where the aliases leave the file.
    pub(crate) onward: Option<WireName>,
}

impl ZoneFile {
    /// Errors: one sentence, without a line of its own.
    pub(crate) fn parse(text: &str, origin: &Name) -> Result<Self, String> {
        if text.lines().any(|line| line.trim_start().to_ascii_uppercase().starts_with("$INCLUDE")) {
            return Err("$INCLUDE names a file that is not there; put its lines into the zone".to_owned());
        }
        let parser = Parser::new(text, None, Some(origin.to_hickory()));
        let (_, sets) = parser.parse().map_err(|error| error.to_string())?;
        let mut names: BTreeMap<Name, Vec<Record>> = BTreeMap::new();
        for record in sets.values().flat_map(|set| set.records_without_rrsigs()) {
            let owner = Name::from_hickory(&record.name).filter(|owner| owner.is_in(origin));
            let owner = owner.ok_or_else(|| format!("{} is not in the zone {origin}", record.name))?;
            names.entry(owner).or_default().push(record.clone());
        }
        let has_soa =
            names.get(origin).is_some_and(|all| all.iter().any(|r| r.record_type() == RecordType::SOA));
        if !has_soa {
            return Err(format!("there is no SOA record of {origin}"));
        }
        Ok(Self { origin: origin.clone(), text: text.into(), names: Arc::new(names) })
    }

    pub(crate) fn answer(&self, name: &Name, record_type: RecordType) -> FromFile {
        let mut found = FromFile::default();
        let mut name = name.clone();
        for _ in 0..MAX_ALIASES {
            if !name.is_in(&self.origin) {
                found.onward = Some(name.to_hickory());
                return found;
            }
            let Some(records) = self.records(&name) else {
                let exists_above = self.names.keys().any(|other| other.is_in(&name));
                found.name_error = !exists_above;
                found.authorities = self.soa();
                return found;
            };
            let owned = |record: &Record| {
                let mut record = record.clone();
                record.name = name.to_hickory();
                record
            };
            let wanted =
                |record: &&Record| record_type == RecordType::ANY || record.record_type() == record_type;
            let of_type: Vec<Record> = records.iter().filter(wanted).map(owned).collect();
            if !of_type.is_empty() {
                found.answers.extend(of_type);
                return found;
            }
            let Some(alias) = records.iter().find(|record| record.record_type() == RecordType::CNAME) else {
                found.authorities = self.soa();
                return found;
            };
            found.answers.push(owned(alias));
            let target = match &alias.data {
                hickory_proto::rr::RData::CNAME(target) => Name::from_hickory(&target.0),
                _ => None,
            };
            match target {
                Some(target) => name = target,
                None => return found,
            }
        }
        found
    }

    /// Of the name, else of the wildcard beside it (RFC 4592) where nothing stands between.
    fn records(&self, name: &Name) -> Option<&Vec<Record>> {
        if let Some(records) = self.names.get(name) {
            return Some(records);
        }
        if self.names.keys().any(|other| other.is_in(name)) {
            return None;
        }
        let mut above = name.parent()?;
        loop {
            if let Some(records) = above.child("*").ok().and_then(|wildcard| self.names.get(&wildcard)) {
                return Some(records);
            }
            let exists = self.names.keys().any(|other| other.is_in(&above));
            if exists || above == self.origin {
                return None;
            }
            above = above.parent()?;
        }
    }

    fn soa(&self) -> Vec<Record> {
        let at_origin = self.names.get(&self.origin).into_iter().flatten();
        at_origin.filter(|record| record.record_type() == RecordType::SOA).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ZONE: &str = "$TTL 300\n@ IN SOA ns hostmaster ( 1 7200 1800 86400 60 )\n@ IN NS ns\nns IN A 192.0.2.1\n\
        www 60 IN CNAME web\nweb IN A 192.0.2.80\nweb IN AAAA 2001:db8::80\nout IN CNAME www.example.net.\n\
        *.apps IN A 192.0.2.81\nb.a IN TXT \"two words\"\n";

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn said(text: &str, record_type: RecordType) -> FromFile {
        ZoneFile::parse(ZONE, &name("example.org")).unwrap().answer(&name(text), record_type)
    }

    fn lines(found: &FromFile) -> Vec<String> {
        found.answers.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn records_aliases_and_wildcards_are_answered() {
        assert_eq!(lines(&said("web.example.org", RecordType::A)), ["web.example.org. 300 IN A 192.0.2.80"]);
        assert_eq!(
            lines(&said("www.example.org", RecordType::AAAA)),
            ["www.example.org. 60 IN CNAME web.example.org.", "web.example.org. 300 IN AAAA 2001:db8::80"]
        );
        assert_eq!(
            lines(&said("x.apps.example.org", RecordType::A)),
            ["x.apps.example.org. 300 IN A 192.0.2.81"]
        );
        let out = said("out.example.org", RecordType::A);
        assert_eq!(out.onward.map(|name| name.to_string()).as_deref(), Some("www.example.net."));
    }

    #[test]
    fn what_is_not_there_has_the_soa() {
        for (text, name_error) in [
            ("absent.example.org", true),
            ("web.example.org", false),
            ("a.example.org", false),
            ("apps.example.org", false),
        ] {
            let found = said(text, RecordType::MX);
            assert_eq!(
                (found.name_error, found.answers.len(), found.authorities.len()),
                (name_error, 0, 1),
                "{text}"
            );
        }
    }

    #[test]
    fn a_bad_zone_is_refused_with_a_sentence() {
        let refused = |text: &str| ZoneFile::parse(text, &name("example.org")).unwrap_err();
        assert!(
            refused("www IN A 192.0.2.1\n").contains("SOA")
                || refused("www IN A 192.0.2.1\n").contains("ttl")
        );
        assert!(refused("$INCLUDE /etc/passwd\n").contains("$INCLUDE"));
        assert!(!refused("@ IN SOA nonsense\n").is_empty());
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "[a-zA-Z0-9@$.*\"();: \t\n]{0,120}") {
            let _ = ZoneFile::parse(&text, &name("example.org"));
            let _ = ZoneFile::parse(&format!("$TTL 5\n@ IN SOA a b 1 2 3 4 5\n{text}"), &name("example.org"));
        }
    }
}
