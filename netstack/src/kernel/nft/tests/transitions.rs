//! From every shape of a table to every other, in one transaction each: what the difference takes for granted about
//! the kernel.

use super::*;

const KEY: [Field; 2] = [Field::L4Protocol, Field::DestinationPort];

fn set(key: Vec<KeyType>, data: SetData, elements: &[(Vec<Datum>, ElementData)]) -> Set {
    let mut set = Set::new(key, data);
    if !elements.is_empty() {
        set.groups.insert("group".into(), group(elements.iter().cloned()));
    }
    set
}

fn tcp(port: u16) -> Vec<Datum> {
    vec![Datum::Protocol(Protocol::Tcp), Datum::Port(port)]
}

fn chain(base: Option<Base>, statements: &[Statement]) -> Chain {
    Chain { base, rules: statements.iter().map(|statement| Rule::new(vec![statement.clone()])).collect() }
}

fn to(chain: &str) -> ElementData {
    ElementData::Verdict(goto(chain))
}

fn shape(chains: &[(&str, Chain)], sets: &[(&str, Set)]) -> Table {
    let mut table = table("weft-shape");
    table.chains = chains.iter().map(|(name, chain)| ((*name).to_owned(), chain.clone())).collect();
    table.sets = sets.iter().map(|(name, set)| ((*name).to_owned(), set.clone())).collect();
    table
}

fn shapes() -> Vec<Table> {
    use KeyType::{Ipv4Address, L4Protocol, Port};
    let ports = || vec![L4Protocol, Port];
    let vmap = Statement::VerdictMap { key: KEY.to_vec(), map: "m".into() };
    let lookup = |key: &[Field]| Statement::Lookup { key: key.to_vec(), negated: false, set: "m".into() };
    let jump = |name: &str| Statement::Verdict(Verdict::Jump(name.into()));
    let input = base(ChainKind::Filter, Hook::Input, -5);
    let verdicts = |elements: &[_]| set(ports(), SetData::Verdict, elements);
    let mut nets = set(
        vec![Ipv4Address],
        SetData::None,
        &[
            (vec![Datum::Net("10.0.0.0/24".parse().unwrap())], ElementData::None),
            (vec![Datum::Net("10.0.1.0/24".parse().unwrap())], ElementData::None),
        ],
    );
    nets.interval = true;
    let mut other_nets = set(
        vec![Ipv4Address],
        SetData::None,
        &[
            (vec![Datum::Net("10.0.0.0/23".parse().unwrap())], ElementData::None),
            (vec![Datum::Net("240.0.0.0/4".parse().unwrap())], ElementData::None),
        ],
    );
    other_nets.interval = true;
    let mut timed = set(vec![Ipv4Address], SetData::None, &[]);
    timed.timeout_millis = Some(5000);
    vec![
        shape(&[], &[]),
        shape(
            &[("a", chain(input, std::slice::from_ref(&vmap))), ("b", chain(None, &[]))],
            &[("m", verdicts(&[(tcp(1), to("b"))]))],
        ),
        shape(
            &[
                ("a", chain(input, std::slice::from_ref(&vmap))),
                ("b", chain(None, &[jump("c")])),
                ("c", chain(None, &[Statement::Counter])),
            ],
            &[("m", verdicts(&[(tcp(1), to("c")), (tcp(2), to("b"))]))],
        ),
        shape(
            &[
                ("c", chain(input, &[jump("b"), vmap])),
                ("b", chain(None, &[jump("a")])),
                ("a", chain(None, &[])),
            ],
            &[("m", verdicts(&[(tcp(1), to("a")), (tcp(3), ElementData::Verdict(Verdict::Drop))]))],
        ),
        shape(
            &[("a", chain(base(ChainKind::Filter, Hook::Forward, -5), &[lookup(&[Field::Ip4Source])]))],
            &[("m", nets)],
        ),
        shape(
            &[("a", chain(base(ChainKind::Filter, Hook::Forward, -5), &[lookup(&[Field::Ip4Source])]))],
            &[("m", other_nets)],
        ),
        shape(
            &[("a", chain(base(ChainKind::Filter, Hook::Forward, -6), &[lookup(&[Field::Ip4Source])]))],
            &[("m", timed)],
        ),
        shape(
            &[
                ("a", chain(base(ChainKind::Nat, Hook::Output, -105), &[lookup(&KEY), Statement::Reject])),
                ("b", chain(None, &[])),
            ],
            &[("m", set(ports(), SetData::None, &[(tcp(1), ElementData::None)]))],
        ),
    ]
}

#[test]
fn every_shape_of_a_table_becomes_every_other_in_one_transaction() {
    in_namespace(|| {
        let shapes = shapes();
        let mut fresh = Vec::new();
        for desired in &shapes {
            NftTable::new("weft-shape").apply(desired, Trust::Nothing).unwrap();
            fresh.push(sorted_listing());
            NftTable::delete("weft-shape").unwrap();
        }
        let mut owner = NftTable::new("weft-shape");
        for (from, first) in shapes.iter().enumerate() {
            for (to, second) in shapes.iter().enumerate() {
                for trust in [Trust::Shadow, Trust::Nothing] {
                    owner.apply(first, trust).unwrap();
                    owner.apply(second, trust).unwrap();
                    assert_eq!(sorted_listing(), fresh[to], "from {from} to {to}, {trust:?}");
                }
            }
        }
        settles(&mut owner, &shapes[shapes.len() - 1]);
    });
}

#[test]
fn a_set_with_room_becomes_larger_and_smaller_below_rules_that_use_it() {
    in_namespace(|| {
        let with = |first: u16, count: u16| {
            let elements: Vec<_> = (first..first + count).map(|port| (tcp(port), to("b"))).collect();
            let mut map = set(vec![KeyType::L4Protocol, KeyType::Port], SetData::Verdict, &elements);
            map.room = Some(Set::room_for(elements.len()));
            let vmap = Statement::VerdictMap { key: KEY.to_vec(), map: "m".into() };
            let input = chain(base(ChainKind::Filter, Hook::Input, -5), &[vmap]);
            shape(&[("a", input), ("b", chain(None, &[]))], &[("m", map)])
        };
        let mut owner = NftTable::new("weft-shape");
        let steps = [
            ((1, 3), 256),
            ((1, 256), 256),
            // Full, and all of it goes for as much again.
            ((1000, 256), 256),
            ((1, 300), 1024),
            ((1, 1024), 1024),
            ((1, 1025), 4096),
            ((1, 200), 4096),
            ((1, 0), 256),
        ];
        for ((first, count), room) in steps {
            owner.apply(&with(first, count), Trust::Shadow).unwrap();
            shows(&format!("size {room}"));
            assert_eq!(owner.elements("m").unwrap().len(), usize::from(count));
            settles(&mut NftTable::new("weft-shape"), &with(first, count));
        }
    });
}
