//! Many peers: a hub that sends to a hundred at once, each a tunnel of its own, and one that is told of a thousand.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};
use weft_netstack::control;
use weft_netstack::kernel::netns::Netns;

use super::tunnels::{End, Kind, Programs, end, hex, set};
use crate::rig::{ip, resident_mib};
use crate::row::{Better, Row, median};

/// Numbers of the ends; 192.0.2.101 and on.
const PEERS: std::ops::Range<usize> = 100..200;
const HUB: usize = 99;
const CONFIGURED: u32 = 1000;
const CHANGES: u32 = 31;
const SECONDS: u64 = 4;
const PATIENCE: Duration = Duration::from_secs(20);

/// The far ends are Weft's for both hubs.
pub(super) fn measure(programs: &Programs) -> anyhow::Result<Vec<Row>> {
    let hub = End::new(HUB);
    let peers: Vec<End> = PEERS.map(End::new).collect();
    ip("link add lan type bridge")?;
    ip("link set lan up")?;
    attach(&hub)?;
    let mut tunnels = Vec::new();
    for peer in &peers {
        attach(peer)?;
        tunnels.push(programs.start(Kind::Weft, peer, &[&hub])?);
        peer.bring_up()?;
    }
    let peers: Vec<&End> = peers.iter().collect();
    let measured = [Kind::Weft, Kind::WireguardGo].map(|kind| of_hub(programs, kind, &hub, &peers));
    for (tunnel, peer) in tunnels.iter_mut().zip(peers) {
        end(tunnel, peer)?;
    }
    let [ours, theirs] = measured;
    let (ours, theirs, name) = (ours?, theirs?, Kind::WireguardGo.name());
    Ok(vec![
        Row::beside(
            "TCP to 100 peers at once",
            "Gbit/s",
            ours.gigabits,
            (name, theirs.gigabits),
            Better::Higher,
            1.5,
        ),
        Row::beside(
            "resident memory with them",
            "MiB",
            ours.resident_mib,
            (name, theirs.resident_mib),
            Better::Lower,
            0.1,
        ),
        Row::bounded(
            "change of one peer of 1,000",
            "ms",
            ours.change_millis,
            (name, theirs.change_millis),
            Better::Lower,
            5.0,
        ),
    ])
}

struct Hub {
    gigabits: f64,
    resident_mib: f64,
    change_millis: f64,
}

fn attach(end: &End) -> anyhow::Result<()> {
    let (n, netns) = (end.n, &end.netns);
    ip(&format!("netns add {netns}"))?;
    ip(&format!("link add port{n} type veth peer name lan netns {netns}"))?;
    ip(&format!("link set port{n} master lan up"))?;
    ip(&format!("-n {netns} addr add 192.0.2.{}/24 dev lan", n + 1))?;
    ip(&format!("-n {netns} link set lan up"))?;
    ip(&format!("-n {netns} link set lo up"))
}

fn of_hub(programs: &Programs, kind: Kind, hub: &End, peers: &[&End]) -> anyhow::Result<Hub> {
    let mut tunnel = programs.start(kind, hub, peers)?;
    let measured = of_tunnel(&tunnel, kind, hub, peers);
    end(&mut tunnel, hub)?;
    measured
}

fn of_tunnel(tunnel: &Child, kind: Kind, hub: &End, peers: &[&End]) -> anyhow::Result<Hub> {
    hub.bring_up()?;
    let gigabits = to_all(hub, peers)?;
    let resident_mib = resident_mib(tunnel.id())?;
    Ok(Hub { gigabits, resident_mib, change_millis: change_one(kind, hub, peers)? })
}

/// One TCP stream to each, for some seconds; what arrives.
fn to_all(hub: &End, peers: &[&End]) -> anyhow::Result<f64> {
    let inside = |end: &End| Netns::open(format!("/run/netns/{}", end.netns));
    let mut pairs = Vec::new();
    for peer in peers {
        let address: SocketAddr = format!("{}:5000", peer.inner()).parse()?;
        let listener = inside(peer)?.run(|| TcpListener::bind(address))??;
        let sender = inside(hub)?.run(|| TcpStream::connect_timeout(&address, PATIENCE))?;
        let sender = sender.with_context(|| format!("reach {}", peer.netns))?;
        pairs.push((sender, listener.accept()?.0));
    }
    let end = Instant::now() + Duration::from_secs(SECONDS);
    let bytes: usize = std::thread::scope(|scope| {
        let receivers: Vec<_> = pairs
            .into_iter()
            .map(|(mut sender, mut receiver)| {
                scope.spawn(move || {
                    let piece = vec![0; 64 * 1024];
                    while Instant::now() < end && sender.write_all(&piece).is_ok() {}
                });
                scope.spawn(move || {
                    let (mut buffer, mut bytes) = (vec![0; 64 * 1024], 0);
                    // What is under way at the end does not count.
                    while let Ok(read @ 1..) = receiver.read(&mut buffer)
                        && Instant::now() < end
                    {
                        bytes += read;
                    }
                    bytes
                })
            })
            .collect();
        receivers.into_iter().map(|receiver| receiver.join().unwrap_or_default()).sum()
    });
    Ok(bytes as f64 * 8.0 / SECONDS as f64 / 1e9)
}

/// Adds peers that are nowhere, then gives one of them another range, again and again.
fn change_one(kind: Kind, hub: &End, peers: &[&End]) -> anyhow::Result<f64> {
    let key = |n: u32| {
        let mut key = [0x33; 32];
        key[..4].copy_from_slice(&n.to_be_bytes());
        key
    };
    let range = |n: u32, third: u32| format!("10.{}.{}.{third}/32", 100 + n / 250, n % 250);
    let socket = hub.control(kind);
    let mut more: Map<String, Value> = Map::new();
    for n in 0..CONFIGURED {
        let peer = json!({
            "node": format!("n{n}"), "endpoint": null, "allowed_ips": [range(n, 0)], "keepalive_seconds": null,
        });
        more.insert(STANDARD.encode(key(n)), peer);
        if kind != Kind::Weft {
            set(&socket, &format!("public_key={}\nallowed_ip={}\n", hex(&key(n)), range(n, 0)))?;
        }
    }
    hub.write_state(peers, &more)?;
    if kind == Kind::Weft {
        control::request(&socket, "POST", "/apply")?;
    }
    let mut times = Vec::new();
    for change in 1..=CHANGES {
        let (n, to) = (change * 17, range(change * 17, change));
        more[&STANDARD.encode(key(n))]["allowed_ips"] = json!([to]);
        let text = format!("public_key={}\nreplace_allowed_ips=true\nallowed_ip={to}\n", hex(&key(n)));
        hub.write_state(peers, &more)?;
        let began = Instant::now();
        match kind {
            Kind::Weft => drop(control::request(&socket, "POST", "/apply")?),
            _ => set(&socket, &text)?,
        }
        times.push(began.elapsed().as_secs_f64() * 1e3);
    }
    Ok(median(times))
}
