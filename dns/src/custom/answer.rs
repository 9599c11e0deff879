//! What is in force, asked about one name. Pure.

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::{Name as WireName, Record, RecordType};

use super::template::Making;
use super::{Block, Custom, Hosts, Matcher, Rewrite};
use crate::name::{Name, suffixes};
use crate::zone::Data;

/// Rules that rewrite one name, one after the other.
const MAX_REWRITES: usize = 16;

/// A name that is to be looked up instead of the one asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rewritten(pub(crate) Name);

/// What users say about a name and type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing; `cluster` names are answered here, else only forwarded.
    Passed { cluster: bool },
    /// In the terms of our own names: these data with this TTL, or none.
    Hosts { data: Vec<Data>, ttl_seconds: u32 },
    Records {
        code: ResponseCode,
        answers: Vec<Record>,
        authorities: Vec<Record>,
        /// Where aliases lead on.
        onward: Option<WireName>,
    },
}

impl Custom {
    /// Whether anything here might say something about the name, in lower-case wire format: cheap, for every question.
    pub(crate) fn concerns(&self, wire: &[u8]) -> bool {
        if self.blocks.is_empty() {
            return false;
        }
        if self.hosts.contains(wire) {
            return true;
        }
        if self.only_hosts {
            return false;
        }
        let Some((zone, block)) = self.block_of(wire) else { return false };
        if block.log || block.may_answer_any(wire) || self.takes_from_cluster(zone, block) {
            return true;
        }
        !block.rewrites.is_empty() && Name::from_wire(wire).is_some_and(|name| block.rewrite(&name).is_some())
    }

    /// Every question for the name is to be logged.
    pub(crate) fn logs(&self, name: &Name) -> bool {
        self.block_of(name.wire()).is_some_and(|(_, block)| block.log)
    }

    pub(crate) fn rewrite(&self, name: &Name) -> Option<Rewritten> {
        self.block_of(name.wire())?.1.rewrite(name).map(Rewritten)
    }

    pub(crate) fn answer(&self, name: &Name, record_type: RecordType) -> Verdict {
        let Some((zone, block)) = self.block_of(name.wire()) else {
            return Verdict::Passed { cluster: true };
        };
        if let Some(verdict) = block.hosts.iter().find_map(|hosts| hosts.answer(name, record_type)) {
            return verdict;
        }
        for template in &block.templates {
            if let Making::Made { code, answers, authorities } = template.answer(name, record_type) {
                return Verdict::Records { code, answers, authorities, onward: None };
            }
        }
        let cluster = *zone == Name::root() || block.kubernetes;
        if cluster && self.own.iter().any(|apex| name.is_in(apex)) {
            return Verdict::Passed { cluster };
        }
        let files = block.files.iter().filter(|file| name.is_in(&file.origin));
        match files.max_by_key(|file| file.origin.wire().len()) {
            Some(file) => {
                let found = file.answer(name, record_type);
                let code = if found.name_error { ResponseCode::NXDomain } else { ResponseCode::NoError };
                let (answers, authorities, onward) = (found.answers, found.authorities, found.onward);
                Verdict::Records { code, answers, authorities, onward }
            }
            None => Verdict::Passed { cluster },
        }
    }

    /// The block of the longest zone that the name is in.
    fn block_of(&self, wire: &[u8]) -> Option<(&Name, &Block)> {
        let inside = |zone: &Name| suffixes(wire).any(|suffix| suffix == zone.wire().as_ref());
        let blocks = self.blocks.iter().filter(|(zone, _)| inside(zone));
        blocks.max_by_key(|(zone, _)| zone.wire().len())
    }

    /// Names of the block's zone are not the cluster's, though they would be by their apex.
    fn takes_from_cluster(&self, zone: &Name, block: &Block) -> bool {
        *zone != Name::root()
            && !block.kubernetes
            && self.own.iter().any(|apex| zone.is_in(apex) || apex.is_in(zone))
    }
}

impl Block {
    /// Any name in some zone, so that only a whole look can tell.
    fn may_answer_any(&self, wire: &[u8]) -> bool {
        let inside = |zone: &Name| suffixes(wire).any(|suffix| suffix == zone.wire().as_ref());
        self.hosts.iter().any(|hosts| !hosts.falls_through && hosts.zones.iter().any(inside))
            || self.templates.iter().any(|template| template.zones.iter().any(inside))
            || self.files.iter().any(|file| inside(&file.origin))
    }

    fn rewrite(&self, name: &Name) -> Option<Name> {
        let mut rewritten: Option<Name> = None;
        for rule in self.rewrites.iter().take(MAX_REWRITES) {
            let current = rewritten.as_ref().unwrap_or(name);
            if let Some(new) = rule.apply(&current.to_string()) {
                rewritten = Some(new);
                if !rule.goes_on {
                    break;
                }
            }
        }
        rewritten
    }
}

impl Rewrite {
    /// `name` in lower case with the final dot; `None` where the rule does not match, or makes no name.
    fn apply(&self, name: &str) -> Option<Name> {
        let to = &self.to;
        let new = match &self.from {
            Matcher::Exact(from) => (name == from).then(|| to.clone()),
            Matcher::Prefix(from) => name.strip_prefix(from.as_str()).map(|rest| format!("{to}{rest}")),
            Matcher::Suffix(from) => name.strip_suffix(from.as_str()).map(|rest| format!("{rest}{to}")),
            Matcher::Substring(from) => name.contains(from.as_str()).then(|| name.replace(from.as_str(), to)),
            Matcher::Regex(pattern) => pattern.0.captures(name).map(|found| {
                let groups = found.iter().enumerate();
                groups.fold(to.clone(), |text, (number, group)| {
                    text.replace(&format!("{{{number}}}"), group.map_or("", |group| group.as_str()))
                })
            }),
        }?;
        Name::parse(&new).ok()
    }
}

impl Hosts {
    /// `None` for a name that is looked up further.
    fn answer(&self, name: &Name, record_type: RecordType) -> Option<Verdict> {
        if !self.zones.iter().any(|zone| name.is_in(zone)) {
            return None;
        }
        let ttl_seconds = self.ttl_seconds;
        if record_type == RecordType::PTR {
            let names = self.names.get(name)?;
            return Some(Verdict::Hosts {
                data: names.iter().cloned().map(Data::Ptr).collect(),
                ttl_seconds,
            });
        }
        match self.addresses.get(name) {
            Some(addresses) => {
                let data = addresses.iter().map(|address| Data::from(*address));
                let wanted =
                    |data: &Data| record_type == RecordType::ANY || data.record_type() == record_type;
                Some(Verdict::Hosts { data: data.filter(wanted).collect(), ttl_seconds })
            }
            None if self.falls_through => None,
            // As CoreDNS: without a zone of its own there is no SOA that a negative answer would need.
            None => Some(Verdict::Records {
                code: ResponseCode::ServFail,
                answers: Vec::new(),
                authorities: Vec::new(),
                onward: None,
            }),
        }
    }
}
