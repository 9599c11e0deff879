//! What users add to the DNS of their cluster: the ConfigMap `kube-system/coredns-custom`, in the words of a Corefile.
//!
//! ```text
//!  ConfigMap --plan (syntax, plan)--> CustomPlan: a Part for each key --over what is in force--> Custom --answer--> Verdict
//! ```
//!
//! A [`Custom`] has one [`Block`] for each zone; the longest zone that a name is in decides, the root's being the default. In
//! a block rewrites come first, then hosts, templates, the cluster's own names (default block, or with `kubernetes`), zone
//! files, and forwarding. A rewritten name is looked up like any other.

mod answer;
mod file;
mod plan;
mod syntax;
mod template;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use regex::Regex;

pub(crate) use answer::{Rewritten, Verdict};
pub(crate) use file::ZoneFile;
pub(crate) use plan::plan;
pub(crate) use template::Template;

use crate::name::Name;

/// TTL of names of Nodes, in seconds.
const NODE_TTL_SECONDS: u32 = 30;

/// One key of the ConfigMap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Read; what was not understood is a Problem.
    Read(Arc<Blocks>),
    /// Cannot be read, a Problem says why: what was there before stays.
    Unreadable,
}

/// Blocks by zone; the root is the default block.
pub type Blocks = BTreeMap<Name, Block>;

/// All keys of the ConfigMap that hold blocks.
pub type Parts = BTreeMap<String, Part>;

/// What users say about one zone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Block {
    pub(crate) rewrites: Vec<Rewrite>,
    pub(crate) hosts: Vec<Hosts>,
    pub(crate) templates: Vec<Template>,
    /// The cluster's own names are answered here too.
    pub(crate) kubernetes: bool,
    pub(crate) files: Vec<ZoneFile>,
    pub(crate) forwards: BTreeMap<Name, Target>,
    /// Answers of upstreams must not lead inside.
    pub(crate) rebinding: Option<Rebinding>,
    /// Which names of pods exist.
    pub(crate) pods: Option<PodMode>,
    /// Longest times that answers are kept, positive and negative ones.
    pub(crate) cache_seconds: (Option<u32>, Option<u32>),
    /// Every question is logged.
    pub(crate) log: bool,
    /// A pod's search path is walked for it; of the default block only.
    pub(crate) autopath: bool,
}

/// Where names are forwarded to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// The host's resolvers.
    Host,
    /// These; nobody, where there are none.
    Servers(Vec<Server>),
}

/// One resolver to ask.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    /// Asked over TLS and in no other way; `None`: plainly.
    pub(crate) tls: Option<Arc<Tls>>,
}

impl Server {
    pub(crate) fn plain(address: SocketAddr) -> Self {
        Self { address, tls: None }
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.tls {
            None => write!(f, "{}", self.address),
            Some(_) => write!(f, "tls://{}", self.address),
        }
    }
}

/// How a server proves who it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Tls {
    /// The name that its certificate has to be for; `None`: its address.
    pub(crate) name: Option<String>,
    /// Who may have signed it, in PEM; `None`: whom the host trusts.
    pub(crate) authorities: Option<Arc<str>>,
}

/// Whom to ask for the names of a domain, and what is believed of their answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Route {
    pub(crate) target: Target,
    /// `None`: whatever they say.
    pub(crate) rebinding: Option<Rebinding>,
}

/// Answers must not lead to addresses inside, in the words of dnsmasq.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rebinding {
    /// `rebind-domain-ok`: names in these may.
    pub(crate) except: Vec<Name>,
    /// `rebind-localhost-ok`: loopback is let in, which lists of blocked senders answer with.
    pub(crate) localhost_ok: bool,
}

/// Which names of pods (`1-2-3-4.<namespace>.pod.<zone>`) exist, in the words of CoreDNS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PodMode {
    /// None.
    Disabled,
    /// Of any address in a Namespace that exists.
    Insecure,
    /// Of addresses that a pod of the Namespace has.
    Verified,
}

/// Names with addresses, as in hosts(5).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Hosts {
    /// Names in none of these are not looked up here.
    pub(crate) zones: Vec<Name>,
    pub(crate) addresses: BTreeMap<Name, BTreeSet<IpAddr>>,
    /// Names by reverse name.
    pub(crate) names: BTreeMap<Name, BTreeSet<Name>>,
    pub(crate) ttl_seconds: u32,
    /// Names that are not here are looked up further.
    pub(crate) falls_through: bool,
}

impl Hosts {
    pub(crate) fn insert(&mut self, name: &Name, address: IpAddr) {
        self.addresses.entry(name.clone()).or_default().insert(address);
        self.names.entry(Name::reverse(address)).or_default().insert(name.clone());
    }
}

/// One name instead of another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rewrite {
    pub(crate) from: Matcher,
    pub(crate) to: String,
    /// The next rule sees the new name.
    pub(crate) goes_on: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Matcher {
    Exact(String),
    Prefix(String),
    Suffix(String),
    Substring(String),
    Regex(Pattern),
}

/// A regular expression; two are equal when their texts are.
#[derive(Clone, Debug)]
pub(crate) struct Pattern(pub(crate) Regex);

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

impl Eq for Pattern {}

/// What is in force.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Custom {
    blocks: Blocks,
    /// Apexes that we answer for, which blocks may take names from.
    own: Vec<Name>,
    /// Every name and reverse name of the blocks' hosts, as wire names.
    hosts: HashSet<Arc<[u8]>>,
    /// Only those names are concerned, as with names of Nodes alone.
    only_hosts: bool,
}

impl Custom {
    /// The parts together, in the order of their keys; of what only one can say the first says it. `nodes` are names of
    /// Nodes, which anything else goes before.
    pub(crate) fn new(parts: &Parts, nodes: &BTreeMap<Name, BTreeSet<IpAddr>>, own: Vec<Name>) -> Self {
        let mut blocks = Blocks::new();
        let read =
            parts.values().filter_map(|part| if let Part::Read(blocks) = part { Some(blocks) } else { None });
        for (zone, block) in read.flat_map(|part| part.iter()) {
            blocks.entry(zone.clone()).or_default().add(block);
        }
        if !nodes.is_empty() {
            let mut hosts = Hosts {
                zones: vec![Name::root()],
                ttl_seconds: NODE_TTL_SECONDS,
                falls_through: true,
                ..Hosts::default()
            };
            for (name, addresses) in nodes {
                addresses.iter().for_each(|address| hosts.insert(name, *address));
            }
            blocks.entry(Name::root()).or_default().hosts.push(hosts);
        }
        let all = blocks.values().flat_map(|block| &block.hosts);
        let named = all.flat_map(|hosts| hosts.addresses.keys().chain(hosts.names.keys()));
        let hosts = named.map(|name| name.wire().clone()).collect();
        let only_hosts = blocks.iter().all(|(zone, block)| *zone == Name::root() && block.says_only_hosts());
        Self { blocks, own, hosts, only_hosts }
    }

    pub(crate) fn says_the_same(&self, other: &Self) -> bool {
        self.blocks == other.blocks
    }

    /// Whom to ask for which names. A block that forwards nothing of its zone asks nobody.
    /// Who names resolvers for a narrower domain than the block's believes them (split horizon).
    pub(crate) fn routes(&self) -> BTreeMap<Name, Route> {
        let mut routes = BTreeMap::new();
        for (zone, block) in &self.blocks {
            let of_zone = |target| Route { target, rebinding: block.rebinding.clone() };
            if *zone != Name::root() {
                routes.insert(zone.clone(), of_zone(Target::Servers(Vec::new())));
            } else if block.rebinding.is_some() {
                routes.insert(zone.clone(), of_zone(Target::Host));
            }
            // In canonical order a longer name comes after those that it is in.
            for (from, target) in &block.forwards {
                let narrower = if from.is_in(zone) { from } else { zone };
                if narrower.is_in(from) {
                    let route = match of_zone(target.clone()) {
                        route if narrower == zone => route,
                        route => Route { rebinding: None, ..route },
                    };
                    routes.insert(narrower.clone(), route);
                }
            }
        }
        routes
    }

    /// Which names of pods exist; every address has one unless somebody says otherwise.
    pub(crate) fn pod_mode(&self) -> PodMode {
        self.blocks.values().find_map(|block| block.pods).unwrap_or(PodMode::Insecure)
    }

    /// The search path of pods is walked for them.
    pub(crate) fn walks_paths(&self) -> bool {
        self.blocks.get(&Name::root()).is_some_and(|block| block.autopath)
    }

    /// Longest times that answers are kept, as the default block says.
    pub(crate) fn cache_seconds(&self) -> (Option<u32>, Option<u32>) {
        self.blocks.get(&Name::root()).map(|block| block.cache_seconds).unwrap_or_default()
    }
}

impl Block {
    /// Nothing about names that are not among its hosts, but where and how they are forwarded.
    fn says_only_hosts(&self) -> bool {
        let Self {
            rewrites,
            hosts,
            templates,
            kubernetes: _,
            files,
            forwards: _,
            rebinding: _,
            pods: _,
            cache_seconds: _,
            log,
            autopath: _,
        } = self;
        let falls_through = hosts.iter().all(|hosts| hosts.falls_through);
        falls_through && rewrites.is_empty() && templates.is_empty() && files.is_empty() && !log
    }

    fn add(&mut self, other: &Self) {
        self.rewrites.extend(other.rewrites.iter().cloned());
        self.hosts.extend(other.hosts.iter().cloned());
        self.templates.extend(other.templates.iter().cloned());
        self.files.extend(other.files.iter().cloned());
        self.kubernetes |= other.kubernetes;
        self.log |= other.log;
        self.autopath |= other.autopath;
        for (from, target) in &other.forwards {
            self.forwards.entry(from.clone()).or_insert_with(|| target.clone());
        }
        self.rebinding = self.rebinding.take().or_else(|| other.rebinding.clone());
        self.pods = self.pods.or(other.pods);
        self.cache_seconds.0 = self.cache_seconds.0.or(other.cache_seconds.0);
        self.cache_seconds.1 = self.cache_seconds.1.or(other.cache_seconds.1);
    }
}

/// Somebody asks for names of existing pods only, or may have before a key became unreadable.
pub(crate) fn may_verify_pods(parts: &Parts) -> bool {
    parts.values().any(|part| match part {
        Part::Read(blocks) => blocks.values().any(|block| block.pods == Some(PodMode::Verified)),
        Part::Unreadable => true,
    })
}

/// The parts that come into force: what cannot be read stays as it is.
pub(crate) fn over(planned: &Parts, in_force: &Parts) -> Parts {
    let part = |(key, part): (&String, &Part)| {
        let kept = match part {
            Part::Unreadable => in_force.get(key).cloned().unwrap_or(Part::Unreadable),
            Part::Read(_) => part.clone(),
        };
        (key.clone(), kept)
    };
    planned.iter().map(part).collect()
}
