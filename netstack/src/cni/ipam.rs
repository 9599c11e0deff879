//! Which address a pod gets: a pure function of the Node's podCIDRs, the leases and the time.
//!
//! Addresses are given in turn (the next free one after the last given, around the end), and a released one rests for
//! [`QUARANTINE_SECONDS`], so that what still remembers the old pod (conntrack, DNS answers, EndpointSlices in flight)
//! does not reach a new one.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use weft_model::objects::ingress_address;

use crate::store::{Boottime, LeaseRecords};

/// Longer than conntrack keeps an unanswered UDP flow and than our DNS answers live (30 s each); short enough that a
/// node of 110 pods does not run out of a /24 when Jobs come and go.
pub const QUARANTINE_SECONDS: u64 = 60;

/// The last address given, by podCIDR.
pub type Cursors = BTreeMap<IpNet, IpAddr>;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IpamError {
    #[error("every pod address of {cidr} is in use ({in_use}) or resting ({resting})")]
    Exhausted { cidr: IpNet, in_use: usize, resting: usize },
    #[error("{cidr} has no room for pods: the network and host addresses take it all")]
    TooSmall { cidr: IpNet },
}

/// One address of every podCIDR, in their order, or nothing. Moves the cursors only when all succeed.
pub fn allocate(
    cidrs: &[IpNet],
    leases: &LeaseRecords,
    cursors: &mut Cursors,
    now: Boottime,
) -> Result<Vec<IpAddr>, IpamError> {
    let given: Vec<IpAddr> = cidrs
        .iter()
        .map(|cidr| next_free(cidr.trunc(), leases, cursors.get(&cidr.trunc()).copied(), now))
        .collect::<Result<_, _>>()?;
    cursors.extend(cidrs.iter().map(IpNet::trunc).zip(given.iter().copied()));
    Ok(given)
}

/// Released leases whose rest is over.
pub fn rested(leases: &LeaseRecords, now: Boottime) -> impl Iterator<Item = IpAddr> + '_ {
    let over = move |released: Boottime| now.0 >= released.0.saturating_add(QUARANTINE_SECONDS);
    leases.iter().filter(move |(_, lease)| lease.released.is_some_and(over)).map(|(address, _)| *address)
}

fn next_free(
    cidr: IpNet,
    leases: &LeaseRecords,
    last_given: Option<IpAddr>,
    now: Boottime,
) -> Result<IpAddr, IpamError> {
    let (first, last) = pod_range(cidr).ok_or(IpamError::TooSmall { cidr })?;
    let rested: Vec<IpAddr> = rested(leases, now).collect();
    let is_free = |candidate: &IpAddr| !leases.contains_key(candidate) || rested.contains(candidate);
    let start = match last_given.map(number) {
        Some(given) if (first..last).contains(&given) => given + 1,
        _ => first,
    };
    // At most one step per lease of the range before a free one must show up, so a /64 is no long walk.
    let candidates = (start..=last).chain(first..start).map(|number| address(cidr, number));
    candidates.take(leases.len() + 1).find(is_free).ok_or_else(|| exhausted(cidr, leases))
}

fn exhausted(cidr: IpNet, leases: &LeaseRecords) -> IpamError {
    let inside = leases.iter().filter(|(address, _)| cidr.contains(*address));
    let (resting, in_use): (Vec<_>, Vec<_>) = inside.partition(|(_, lease)| lease.released.is_some());
    IpamError::Exhausted { cidr, in_use: in_use.len(), resting: resting.len() }
}

/// How many addresses a range has for pods.
pub(super) fn pod_addresses(cidr: IpNet) -> u128 {
    pod_range(cidr.trunc()).map_or(0, |(first, last)| last - first + 1)
}

/// First and last pod address: after the network, host and ingress addresses, before the IPv4 broadcast address.
fn pod_range(cidr: IpNet) -> Option<(u128, u128)> {
    let (network, last, ipv4) = numbers(cidr);
    let last = if ipv4 { last.checked_sub(1)? } else { last };
    let first = match ingress_address(&cidr) {
        Some(ingress) => number(ingress) + 1,
        None => network.checked_add(2)?,
    };
    (first <= last).then_some((first, last))
}

fn numbers(cidr: IpNet) -> (u128, u128, bool) {
    let ipv4 = cidr.addr().is_ipv4();
    let last = match cidr {
        IpNet::V4(cidr) => cidr.broadcast().into(),
        IpNet::V6(cidr) => cidr.broadcast().into(),
    };
    (number(cidr.network()), number(last), ipv4)
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u32::from(v4).into(),
        IpAddr::V6(v6) => v6.into(),
    }
}

/// The inverse of [`number`] within the family of `cidr`.
fn address(cidr: IpNet, number: u128) -> IpAddr {
    match cidr {
        IpNet::V4(_) => Ipv4Addr::from(u32::try_from(number).unwrap_or(u32::MAX)).into(),
        IpNet::V6(_) => Ipv6Addr::from(number).into(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use weft_model::objects::host_address;

    use super::*;
    use crate::store::Lease;

    fn lease(released: Option<u64>) -> Lease {
        Lease {
            container_id: "c".to_owned(),
            ifname: "eth0".to_owned(),
            netns: String::new(),
            pod: None,
            pod_uid: String::new(),
            link: "weftp0".to_owned(),
            host_ports: Vec::new(),
            bandwidth: weft_model::objects::Bandwidth::default(),
            released: released.map(Boottime),
        }
    }

    fn one(cidr: &str, leases: &LeaseRecords, cursors: &mut Cursors, now: u64) -> Result<String, IpamError> {
        allocate(&[cidr.parse().unwrap()], leases, cursors, Boottime(now)).map(|given| given[0].to_string())
    }

    #[test]
    fn pods_start_after_the_addresses_of_host_and_ingress() {
        let none = LeaseRecords::new();
        assert_eq!(host_address(&"10.1.2.0/24".parse().unwrap()), Some("10.1.2.1".parse().unwrap()));
        assert_eq!(host_address(&"fd00:1::/64".parse().unwrap()), Some("fd00:1::1".parse().unwrap()));
        assert_eq!(ingress_address(&"10.1.2.0/24".parse().unwrap()), Some("10.1.2.2".parse().unwrap()));
        assert_eq!(one("10.1.2.0/24", &none, &mut Cursors::new(), 0).as_deref(), Ok("10.1.2.3"));
        assert_eq!(one("fd00:1::/64", &none, &mut Cursors::new(), 0).as_deref(), Ok("fd00:1::3"));
        assert_eq!(one("10.1.2.0/30", &none, &mut Cursors::new(), 0).as_deref(), Ok("10.1.2.2"), "no room");
    }

    #[test]
    fn addresses_are_given_in_turn_and_around_the_end() {
        let (mut leases, mut cursors) = (LeaseRecords::new(), Cursors::new());
        let mut given = vec![];
        for _ in 0..7 {
            let address = one("10.0.0.0/29", &leases, &mut cursors, 1000).unwrap();
            leases.insert(address.parse().unwrap(), lease(Some(0)));
            given.push(address);
        }
        let last: Vec<_> = given.iter().map(|address| address.rsplit('.').next().unwrap()).collect();
        assert_eq!(last, ["3", "4", "5", "6", "3", "4", "5"]);
    }

    #[test]
    fn a_released_address_rests() {
        let leases: LeaseRecords = [("10.0.0.2".parse().unwrap(), lease(Some(100)))].into();
        let error =
            one("10.0.0.0/30", &leases, &mut Cursors::new(), 100 + QUARANTINE_SECONDS - 1).unwrap_err();
        assert_eq!(error.to_string(), "every pod address of 10.0.0.0/30 is in use (0) or resting (1)");
        let after = one("10.0.0.0/30", &leases, &mut Cursors::new(), 100 + QUARANTINE_SECONDS);
        assert_eq!(after.as_deref(), Ok("10.0.0.2"));
    }

    #[test]
    fn a_range_without_room_is_named() {
        for cidr in ["10.0.0.0/32", "10.0.0.0/31", "fd00::/128", "fd00::/127"] {
            let error = one(cidr, &LeaseRecords::new(), &mut Cursors::new(), 0).unwrap_err();
            assert_eq!(error, IpamError::TooSmall { cidr: cidr.parse().unwrap() });
        }
        assert_eq!(host_address(&"10.0.0.0/32".parse().unwrap()), None);
    }

    #[test]
    fn when_one_family_is_exhausted_no_cursor_moves() {
        let leases: LeaseRecords = [("10.0.0.2".parse().unwrap(), lease(None))].into();
        let mut cursors = Cursors::new();
        let cidrs = ["fd00::/64".parse().unwrap(), "10.0.0.0/30".parse().unwrap()];
        assert!(allocate(&cidrs, &leases, &mut cursors, Boottime(0)).is_err());
        assert_eq!(cursors, Cursors::new());
    }

    #[derive(Clone, Debug)]
    enum Step {
        Add,
        Del(usize),
        Wait(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => Just(Step::Add),
            2 => any::<usize>().prop_map(Step::Del),
            1 => (0..90u64).prop_map(Step::Wait),
        ]
    }

    fn cidr() -> impl Strategy<Value = IpNet> {
        prop_oneof![
            (any::<u32>(), 24..=30u8).prop_map(|(bits, length)| IpNet::new(
                Ipv4Addr::from(bits).into(),
                length
            )
            .unwrap()),
            (any::<u128>(), 120..=126u8).prop_map(|(bits, length)| IpNet::new(
                Ipv6Addr::from(bits).into(),
                length
            )
            .unwrap()),
        ]
    }

    proptest! {
        /// Against the obvious model: an address is given only when nobody has it, it has rested, and it is one of
        /// the range's pod addresses; and it is refused only when there is none.
        #[test]
        fn no_address_is_ever_given_twice(cidr in cidr(), steps in proptest::collection::vec(step(), 1..200)) {
            let (mut leases, mut cursors, mut now) = (LeaseRecords::new(), Cursors::new(), 1000);
            let network = cidr.network();
            let broadcast = network.is_ipv4().then(|| cidr.broadcast());
            let reserved = [Some(network), host_address(&cidr), ingress_address(&cidr), broadcast];
            let pods: Vec<IpAddr> =
                cidr.trunc().hosts().filter(|address| !reserved.contains(&Some(*address))).collect();
            for step in steps {
                match step {
                    Step::Wait(seconds) => now += seconds,
                    Step::Del(index) => {
                        let mut live: Vec<_> = leases.values_mut().filter(|l| l.released.is_none()).collect();
                        if !live.is_empty() {
                            let index = index % live.len();
                            live[index].released = Some(Boottime(now));
                        }
                    }
                    Step::Add => {
                        let usable = |address: &&IpAddr| leases.get(*address).is_none_or(|lease| {
                            lease.released.is_some_and(|at| now - at.0 >= QUARANTINE_SECONDS)
                        });
                        let free: Vec<IpAddr> = pods.iter().filter(usable).copied().collect();
                        match allocate(&[cidr], &leases, &mut cursors, Boottime(now)) {
                            Ok(given) => {
                                prop_assert!(free.contains(&given[0]), "{given:?} of {free:?}");
                                leases.insert(given[0], lease(None));
                            }
                            Err(error) => prop_assert!(free.is_empty(), "{error} with {free:?}"),
                        }
                    }
                }
            }
        }
    }
}
