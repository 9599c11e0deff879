//! Against the real kernel: each test in a network namespace of its own, checked with Debian's `nft`.

mod damage;
mod kube_proxy;
mod listing;
mod passage;
mod scale;
mod traffic;
mod transitions;

use std::process::Command;
use std::sync::Arc;

use weft_model::objects::Protocol;
use weft_model::ruleset::*;

use super::*;

/// Runs `test` in a new network namespace, which ends with it; prints and returns when not root.
pub(crate) fn in_namespace(test: impl FnOnce() + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: needs root");
        return;
    }
    let thread = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Output of a command in the calling thread's namespace; panics with what it says when it fails.
pub(crate) fn run(command: &str) -> String {
    let output = Command::new("sh").arg("-c").arg(command).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command}: {}\n{err}\n{out}", output.status);
    out.into_owned()
}

/// Waits until the namespace's IPv6 addresses can be used: the kernel makes their routes in the background.
pub(crate) fn await_addresses() {
    run(r#"timeout 10 sh -c '
        for address in $(ip -6 -o addr show scope global | awk "{print \$4}" | cut -d/ -f1); do
            until ip -6 route show table local | grep -q "^local $address "; do sleep 0.01; done
        done'"#);
}

/// `nft list ruleset` without indentation; that it works at all is part of every test.
fn listing() -> String {
    run("nft -j list ruleset > /dev/null");
    run("nft list ruleset").lines().map(str::trim).collect::<Vec<_>>().join("\n")
}

/// The listing with its chains and sets sorted: the kernel keeps them in the order they were made.
fn sorted_listing() -> String {
    let listing = listing();
    let body = listing.strip_suffix("\n}").unwrap_or(&listing);
    let blocks = body.split("\n\n").map(|block| match block.split_once('\n') {
        Some((first, rest)) if first.starts_with("table ") => rest,
        _ => block,
    });
    let mut blocks: Vec<_> = blocks.collect();
    blocks.sort_unstable();
    blocks.join("\n")
}

#[track_caller]
fn shows(text: &str) {
    let listing = listing();
    assert!(listing.contains(text), "missing: {text}\n{listing}");
}

#[track_caller]
fn shows_not(text: &str) {
    let listing = listing();
    assert!(!listing.contains(text), "still there: {text}\n{listing}");
}

fn table(name: &str) -> Table {
    Table { name: name.into(), ..Table::default() }
}

fn base(kind: ChainKind, hook: Hook, priority: i32) -> Option<Base> {
    Some(Base { kind, hook, priority })
}

fn group(elements: impl IntoIterator<Item = (Vec<Datum>, ElementData)>) -> Arc<Elements> {
    Arc::new(elements.into_iter().collect())
}

fn ip(text: &str) -> Datum {
    Datum::Ip(text.parse().unwrap())
}

fn goto(chain: &str) -> Verdict {
    Verdict::Goto(chain.into())
}

const SERVICE_KEY_V4: [Field; 3] = [Field::Ip4Destination, Field::L4Protocol, Field::DestinationPort];
const SERVICE_KEY_V6: [Field; 3] = [Field::Ip6Destination, Field::L4Protocol, Field::DestinationPort];

fn with_random(key: &[Field], modulus: u32) -> Vec<Field> {
    key.iter().copied().chain([Field::RandomModulo(modulus)]).collect()
}

/// Address, port, and the endpoints of a TCP service.
type Service<'a> = (&'a str, u16, &'a [(&'a str, u16)]);

/// The proxy's layout "map" for these services, all with the same number of endpoints.
fn proxy(services: &[Service<'_>]) -> Table {
    use KeyType::{Index, Ipv4Address, Ipv6Address, L4Protocol, Port};
    let mut table = table("weft-proxy");
    for (suffix, address, data, key, ipv6) in [
        ("", Ipv4Address, SetData::Ipv4AddressAndPort, SERVICE_KEY_V4, false),
        ("6", Ipv6Address, SetData::Ipv6AddressAndPort, SERVICE_KEY_V6, true),
    ] {
        let mut ips = Set::new(vec![address, L4Protocol, Port], SetData::Verdict);
        let mut endpoints = Set::new(vec![address, L4Protocol, Port, Index], data);
        for (vip, port, backends) in services.iter().filter(|(vip, ..)| vip.contains(':') == ipv6) {
            let service = vec![ip(vip), Datum::Protocol(Protocol::Tcp), Datum::Port(*port)];
            let chain = format!("lb{suffix}-{}", backends.len());
            let verdict = ElementData::Verdict(goto(&chain));
            ips.groups.insert((*vip).into(), group([(service.clone(), verdict)]));
            let elements = backends.iter().enumerate().map(|(index, (address, port))| {
                let key = [service.clone(), vec![Datum::Index(u32::try_from(index).unwrap())]].concat();
                (key, ElementData::AddressAndPort(address.parse().unwrap(), *port))
            });
            endpoints.groups.insert((*vip).into(), group(elements));
            let dnat = Statement::DnatMap {
                ipv6,
                key: with_random(&key, u32::try_from(backends.len()).unwrap()),
                map: format!("endpoints{suffix}"),
            };
            table.chains.insert(chain, Chain { base: None, rules: vec![Rule::new(vec![dnat])] });
        }
        table.sets.insert(format!("service-ips{suffix}"), ips);
        table.sets.insert(format!("endpoints{suffix}"), endpoints);
    }
    let rules = [(SERVICE_KEY_V4, "service-ips"), (SERVICE_KEY_V6, "service-ips6")].map(|(key, map)| {
        Rule::new(vec![Statement::VerdictMap { key: key.to_vec(), map: map.into() }]).comment("to services")
    });
    for (name, hook) in [("prerouting", Hook::Prerouting), ("output", Hook::Output)] {
        table.chains.insert(
            name.into(),
            Chain {
                base: base(ChainKind::Nat, hook, -105),
                rules: vec![Rule::new(vec![Statement::Verdict(Verdict::Jump("services".into()))])],
            },
        );
    }
    table.chains.insert("services".into(), Chain { base: None, rules: rules.to_vec() });
    table
}

/// Applies, without trust and then with, and asserts that nothing is left to do.
#[track_caller]
fn settles(owner: &mut NftTable, desired: &Table) {
    for trust in [Trust::Nothing, Trust::Shadow, Trust::Nothing] {
        assert_eq!(owner.apply(desired, trust).unwrap(), Vec::<String>::new());
    }
}
