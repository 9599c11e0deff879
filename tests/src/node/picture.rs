//! Everything of a host that Weft may touch, to be compared object by object.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::{ip, run};

/// By kind, the objects: one line each for the kernel's, a file's path with its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture(BTreeMap<String, Vec<String>>);

impl Picture {
    /// The calling process's network namespace, and the given folders.
    pub fn take(folders: &[&Path]) -> Self {
        let mut kinds = BTreeMap::new();
        let mut add = |kind: &str, objects: Vec<String>| kinds.insert(kind.to_owned(), objects);
        add("nft", ruleset());
        add("sysctls", sysctls());
        for family in ["-4", "-6"] {
            add(&format!("routes {family}"), sorted(&ip(&format!("{family} route show table all"))));
            add(&format!("rules {family}"), lines(&ip(&format!("{family} rule"))));
        }
        add("queues", lines(&run(Command::new("tc").args(["qdisc", "show"]))));
        add("links", lines(&ip("-o link")));
        add("addresses", lines(&ip("-o addr")));
        for folder in folders {
            add(&format!("files in {}", folder.display()), files(folder));
        }
        Self(kinds)
    }

    /// Objects of one kind, such as `nft` or `routes -6`.
    pub fn of(&self, kind: &str) -> &[String] {
        self.0.get(kind).map(Vec::as_slice).unwrap_or_default()
    }

    /// What stands in only one of the two, each with its kind.
    pub fn differences(&self, later: &Self) -> Vec<String> {
        let mut found = Vec::new();
        for kind in self.0.keys().chain(later.0.keys().filter(|kind| !self.0.contains_key(*kind))) {
            let (before, after) = (self.of(kind), later.of(kind));
            let missing = before.iter().filter(|object| !after.contains(object));
            found.extend(missing.map(|object| format!("{kind}: gone: {object}")));
            let new = after.iter().filter(|object| !before.contains(object));
            found.extend(new.map(|object| format!("{kind}: new: {object}")));
            if found.is_empty() && before != after {
                found.push(format!("{kind}: another order: {before:#?} {after:#?}"));
            }
        }
        found
    }
}

/// The rule set with the handles of its objects, which an object keeps for as long as it lives. Counters left out, and what comes
/// and goes by itself: elements of sets with a timeout.
pub fn ruleset_with_handles() -> Vec<String> {
    let (mut passing, mut inside) = (false, false);
    let mut lines = lines(&nft(&["-a", "-s", "list", "ruleset"]));
    lines.retain(|line| {
        let line = line.trim_start();
        passing = line.starts_with("flags ") && line.contains("timeout") || passing && line != "}";
        inside = passing && line.starts_with("elements = {") || inside;
        let kept = !inside;
        inside &= !line.ends_with('}');
        kept
    });
    lines
}

/// Tables, chains, sets with their elements in order, rules with their places: a line each, without handles and counts, and
/// without elements that come and go by themselves.
fn ruleset() -> Vec<String> {
    let list: Value = serde_json::from_str(&nft(&["-j", "-s", "list", "ruleset"])).expect("nft prints JSON");
    let mut places = BTreeMap::new();
    let mut found = Vec::new();
    for object in list["nftables"].as_array().into_iter().flatten() {
        let Some((kind, object)) = object.as_object().and_then(|object| object.iter().next()) else {
            continue;
        };
        let mut object = object.clone();
        let passing =
            object["flags"].as_array().is_some_and(|flags| flags.iter().any(|flag| flag == "timeout"));
        if let Some(fields) = object.as_object_mut() {
            fields.remove("handle");
            fields.retain(|name, _| name != "elem" || !passing);
        }
        if let Some(elements) = object["elem"].as_array_mut() {
            elements.sort_by_key(Value::to_string);
        }
        match kind.as_str() {
            "metainfo" => {}
            "rule" => {
                let chain = format!("{} {} {}", object["family"], object["table"], object["chain"]);
                let place = places.entry(chain).and_modify(|place| *place += 1).or_insert(0_u32);
                found.push(format!("rule {place} {object}"));
            }
            _ => found.push(format!("{kind} {object}")),
        }
    }
    found.sort();
    found
}

fn nft(args: &[&str]) -> String {
    run(Command::new("nft").args(args))
}

fn lines(text: &str) -> Vec<String> {
    text.lines().map(|line| line.trim_end().to_owned()).collect()
}

fn sorted(text: &str) -> Vec<String> {
    let mut lines = lines(text);
    lines.sort();
    lines
}

/// `NAME = VALUE` for all that belongs to the network namespace and is readable.
fn sysctls() -> Vec<String> {
    let mut found = Vec::new();
    for folder in ["/proc/sys/net/ipv4", "/proc/sys/net/ipv6", "/proc/sys/net/netfilter"] {
        walk(Path::new(folder), &mut |path| {
            // Counts what happens, sets nothing.
            let is_state = path.ends_with("nf_conntrack_count");
            if let Ok(value) = std::fs::read_to_string(path)
                && !is_state
            {
                found.push(format!("{} = {}", path.display(), value.trim()));
            }
        });
    }
    found.sort();
    found
}

fn files(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    walk(folder, &mut |path| {
        let size = path.metadata().map_or(0, |metadata| metadata.len());
        found.push(format!("{} ({size} bytes)", path.display()));
    });
    found.sort();
    found
}

fn walk(folder: &Path, visit: &mut dyn FnMut(&Path)) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        match path.is_dir() {
            true => walk(&path, visit),
            false => visit(&path),
        }
    }
}
