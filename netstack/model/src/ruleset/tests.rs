//! The difference against a kernel in memory: it converges from any state, and a second time does nothing.

use std::collections::BTreeSet;

use proptest::collection::{btree_map, btree_set, vec};
use proptest::prelude::*;

use super::fake::{Errno, FakeKernel};
use super::*;

/// Some valid table: rules and elements refer to chains and sets that exist.
fn any_table() -> impl Strategy<Value = Table> {
    let shape = (btree_set(0..6u8, 0..5), btree_map(0..5u8, any_set(), 0..4));
    shape.prop_flat_map(|(plain, sets)| {
        let chains = btree_map(0..4u8, (any_base(), vec(any_rule(&plain, &sets), 0..3)), 0..4);
        let plain_rules = vec(vec(any_rule(&BTreeSet::new(), &sets), 0..2), plain.len());
        let elements: Vec<_> = sets.values().map(|set| any_elements(set, &plain)).collect();
        (Just(plain), Just(sets), chains, plain_rules, elements).prop_map(assemble)
    })
}

type Parts = (
    BTreeSet<u8>,
    BTreeMap<u8, Set>,
    BTreeMap<u8, (Base, Vec<Rule>)>,
    Vec<Vec<Rule>>,
    Vec<BTreeMap<String, Elements>>,
);

fn assemble((plain, sets, bases, plain_rules, elements): Parts) -> Table {
    let mut table = Table { name: "weft-test".into(), ..Table::default() };
    for (name, rules) in plain.iter().zip(plain_rules) {
        table.chains.insert(format!("c{name}"), Chain { base: None, rules });
    }
    // The names overlap with those of plain chains of another table, so that a base comes and goes.
    for (name, (base, rules)) in bases {
        table.chains.entry(format!("c{}", name + 4)).or_insert(Chain { base: Some(base), rules });
    }
    for ((name, mut set), groups) in sets.into_iter().zip(elements) {
        let mut seen = BTreeSet::new();
        for (group, mut elements) in groups {
            elements.retain(|key, _| seen.insert(key.to_vec()));
            set.groups.insert(group.into(), Arc::new(elements));
        }
        if set.timeout_millis.is_some() {
            set.groups.clear();
        }
        table.sets.insert(format!("s{name}"), set);
    }
    table
}

fn any_base() -> impl Strategy<Value = Base> {
    let hook = prop_oneof![Just(Hook::Input), Just(Hook::Forward)];
    (hook, 0..2i32).prop_map(|(hook, priority)| Base { kind: ChainKind::Filter, hook, priority })
}

fn any_set() -> impl Strategy<Value = Set> {
    (any::<bool>(), prop::option::weighted(0.1, Just(600u64)), any::<bool>()).prop_map(
        |(verdicts, timeout, wide)| {
            let key = if wide { vec![KeyType::Port, KeyType::Index] } else { vec![KeyType::Port] };
            let mut set = Set::new(key, if verdicts { SetData::Verdict } else { SetData::None });
            set.timeout_millis = timeout;
            set
        },
    )
}

fn verdicts(chains: &BTreeSet<u8>) -> BoxedStrategy<Verdict> {
    let to: Vec<_> = chains.iter().map(|name| Verdict::Goto(format!("c{name}").into())).collect();
    if to.is_empty() { Just(Verdict::Drop).boxed() } else { prop::sample::select(to).boxed() }
}

fn any_rule(chains: &BTreeSet<u8>, sets: &BTreeMap<u8, Set>) -> BoxedStrategy<Rule> {
    let mut statements: Vec<BoxedStrategy<Statement>> =
        vec![Just(Statement::Counter).boxed(), verdicts(chains).prop_map(Statement::Verdict).boxed()];
    for (name, set) in sets {
        let (key, name) = (vec![Field::DestinationPort], format!("s{name}"));
        statements.push(match set.data {
            SetData::Verdict => Just(Statement::VerdictMap { key, map: name }).boxed(),
            _ => Just(Statement::Lookup { key, negated: false, set: name }).boxed(),
        });
    }
    vec(proptest::strategy::Union::new(statements), 1..3).prop_map(Rule::new).boxed()
}

fn any_elements(set: &Set, chains: &BTreeSet<u8>) -> BoxedStrategy<BTreeMap<String, Elements>> {
    let wide = set.key.len() > 1;
    let key = (0..8u16).prop_map(move |port| match wide {
        true => vec![Datum::Port(port), Datum::Index(0)],
        false => vec![Datum::Port(port)],
    });
    let data = match set.data {
        SetData::Verdict => verdicts(chains).prop_map(ElementData::Verdict).boxed(),
        _ => Just(ElementData::None).boxed(),
    };
    let elements = btree_map(key, data, 0..6).prop_map(Elements::from_iter);
    btree_map("[ab]", elements, 0..3).boxed()
}

/// Without groups, as the kernel has it.
fn ungrouped(table: &Table) -> Table {
    let mut table = table.clone();
    for set in table.sets.values_mut() {
        let elements: Elements = set.elements().map(|(key, data)| (key.to_vec(), data.clone())).collect();
        set.groups.clear();
        if !elements.is_empty() {
            set.groups.insert("".into(), Arc::new(elements));
        }
    }
    table
}

fn converges(kernel: &mut FakeKernel, to: &Table) {
    let before = kernel.table.clone();
    let ops = diff(before.as_ref(), to);
    assert_eq!(kernel.commit(&ops), Ok(()), "{ops:#?}");
    if let Some(table) = &mut kernel.table {
        table.name.clone_from(&to.name);
    }
    assert_eq!(kernel.table.as_ref().map(ungrouped), Some(ungrouped(to)));
    assert_eq!(diff(kernel.table.as_ref(), to), [], "a second time there is nothing to do");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

    #[test]
    fn any_table_becomes_any_other(from in prop::option::of(any_table()), to in any_table()) {
        let mut kernel = FakeKernel::default();
        if let Some(from) = &from {
            converges(&mut kernel, from);
            // The shadow of the owner still knows the groups.
            let ops = diff(Some(from), &to);
            prop_assert_eq!(kernel.clone().commit(&ops), Ok(()), "{:#?}", ops);
        }
        converges(&mut kernel, &to);
    }

    #[test]
    fn declarations_and_hooks_change_below_rules_that_stay(from in any_table(), changed in 0..32u8) {
        let mut kernel = FakeKernel::default();
        converges(&mut kernel, &from);
        let mut to = from.clone();
        for (index, set) in to.sets.values_mut().enumerate() {
            set.interval = changed >> index & 1 == 1;
        }
        for base in to.chains.values_mut().filter_map(|chain| chain.base.as_mut()) {
            base.priority += i32::from(changed & 1);
        }
        prop_assert_eq!(kernel.clone().commit(&diff(Some(&from), &to)), Ok(()));
        converges(&mut kernel, &to);
    }

    #[test]
    fn a_table_differs_in_nothing_from_itself(table in any_table()) {
        prop_assert_eq!(diff(Some(&table), &table), []);
        let observed = ungrouped(&table);
        prop_assert_eq!(diff(Some(&observed), &table), []);
    }

    #[test]
    fn a_failure_anywhere_changes_nothing_and_the_next_try_heals(
        from in any_table(), to in any_table(), fail_at in 0..20usize,
    ) {
        let mut kernel = FakeKernel::default();
        converges(&mut kernel, &from);
        let before = kernel.clone();
        let table = kernel.table.clone();
        let ops = diff(table.as_ref(), &to);
        kernel.fail_at = Some(fail_at);
        if fail_at < ops.len() {
            prop_assert_eq!(kernel.commit(&ops), Err(Errno::Injected));
            prop_assert_eq!(&kernel, &before);
        }
        kernel.fail_at = None;
        converges(&mut kernel, &to);
    }

    #[test]
    fn a_shadow_catches_up(from in any_table(), to in any_table()) {
        let mut shadow = from.clone();
        shadow.catch_up(&to);
        prop_assert_eq!(&shadow, &to);
    }
}

fn port_set(groups: &[(&str, &[u16])]) -> Table {
    let mut set = Set::new(vec![KeyType::Port], SetData::None);
    for (name, ports) in groups {
        let elements = ports.iter().map(|port| (vec![Datum::Port(*port)], ElementData::None));
        set.groups.insert((*name).into(), Arc::new(elements.collect()));
    }
    let mut table = Table { name: "weft-test".into(), ..Table::default() };
    table.sets.insert("ports".into(), set);
    table
}

fn lines(ops: &[Op<'_>]) -> Vec<String> {
    ops.iter().map(ToString::to_string).collect()
}

#[test]
fn one_element_of_one_group_is_one_operation() {
    let from = port_set(&[("a", &[1, 2]), ("b", &[3])]);
    let to = port_set(&[("a", &[1, 2]), ("b", &[3, 4])]);
    assert_eq!(lines(&diff(Some(&from), &to)), ["add element ports { 4 }"]);
    assert_eq!(lines(&diff(Some(&to), &from)), ["delete element ports { 4 }"]);
}

#[test]
fn an_element_that_moves_to_another_group_is_no_change() {
    let from = port_set(&[("a", &[1, 2]), ("b", &[3])]);
    let to = port_set(&[("b", &[1, 2, 3])]);
    assert_eq!(diff(Some(&from), &to), []);
}

#[test]
fn one_key_in_two_groups_does_not_refuse_the_table() {
    let mut table = port_set(&[]);
    let set = table.sets.get_mut("ports").unwrap();
    set.data = SetData::Verdict;
    for (name, verdict) in [("a", Verdict::Drop), ("b", Verdict::Accept)] {
        let elements = [(vec![Datum::Port(1)], ElementData::Verdict(verdict))];
        set.groups.insert(name.into(), Arc::new(elements.into()));
    }
    let mut kernel = FakeKernel::default();
    assert_eq!(kernel.commit(&diff(None, &table)), Ok(()));
    let elements: Vec<_> = kernel.table.iter().flat_map(|table| table.sets["ports"].elements()).collect();
    let [(key, data)] = &elements[..] else { panic!("{elements:?}") };
    assert_eq!((key.to_vec(), data), (vec![Datum::Port(1)], &ElementData::Verdict(Verdict::Accept)));
    assert_eq!(diff(kernel.table.as_ref(), &table), []);
}

#[test]
fn elements_of_a_set_with_a_timeout_are_left_alone() {
    let (mut from, mut to) = (port_set(&[("a", &[1])]), port_set(&[("a", &[2])]));
    for table in [&mut from, &mut to] {
        table.sets.get_mut("ports").unwrap().timeout_millis = Some(600);
    }
    assert_eq!(diff(Some(&from), &to), []);
    assert_eq!(lines(&diff(None, &to)), ["add table", "add set ports"]);
}

#[test]
fn a_set_of_another_type_is_rebuilt_with_the_chains_that_use_it() {
    let lookup = Statement::Lookup { key: vec![Field::DestinationPort], negated: false, set: "ports".into() };
    let mut from = port_set(&[("a", &[1])]);
    from.chains.insert("input".into(), Chain { base: None, rules: vec![Rule::new(vec![lookup])] });
    from.chains
        .insert("other".into(), Chain { base: None, rules: vec![Rule::new(vec![Statement::Counter])] });
    let mut to = from.clone();
    to.sets.get_mut("ports").unwrap().interval = true;
    assert_eq!(
        lines(&diff(Some(&from), &to)),
        [
            "flush chain input",
            "delete set ports",
            "add set ports",
            "add element ports { 1 }",
            "add rule input th dport @ports",
        ]
    );
}

/// Looked up by a chain, with room as a planner gives it.
fn set_with_room(count: u16) -> Table {
    let ports: Vec<u16> = (0..count).collect();
    let mut table = port_set(&[("a", &ports)]);
    table.sets.get_mut("ports").unwrap().room = Some(Set::room_for(ports.len()));
    let lookup = Statement::Lookup { key: vec![Field::DestinationPort], negated: false, set: "ports".into() };
    table.chains.insert("input".into(), Chain { base: None, rules: vec![Rule::new(vec![lookup])] });
    table
}

#[test]
fn a_set_is_made_anew_when_it_is_too_small_or_much_too_large_and_not_before() {
    let mut kernel = FakeKernel::default();
    let mut shadow = Table::default();
    let mut rooms = Vec::new();
    for count in [0, 200, 256, 257, 256, 1000, 1025, 900, 5000, 0] {
        let table = set_with_room(count);
        let before = kernel.table.clone();
        assert_eq!(kernel.commit(&diff(before.as_ref(), &table)), Ok(()), "{count}");
        shadow.catch_up(&table);
        let room = kernel.table.as_ref().unwrap().sets["ports"].room;
        assert_eq!(shadow.sets["ports"].room, room, "{count}");
        assert_eq!(diff(Some(&shadow), &table), [], "{count}");
        rooms.push(room.unwrap());
    }
    assert_eq!(rooms, [256, 256, 256, 1024, 1024, 1024, 4096, 4096, 16384, 256]);
}

#[test]
fn a_set_that_grows_as_it_has_to_stays_as_it_is() {
    let table = set_with_room(5000);
    let mut older = table.clone();
    older.sets.get_mut("ports").unwrap().room = None;
    assert_eq!(diff(Some(&older), &table), []);
    assert!(!diff(Some(&table), &older).is_empty());
}

#[test]
fn a_table_prints_as_nft_writes_it() {
    let mut table = port_set(&[("b", &[3]), ("a", &[443, 7])]);
    let mut alive = Set::new(vec![KeyType::Ipv6Address, KeyType::L4Protocol], SetData::Verdict);
    alive.timeout_millis = Some(1500);
    table.sets.insert("alive".into(), alive);
    let base = Base { kind: ChainKind::Nat, hook: Hook::Prerouting, priority: -105 };
    let dnat = Statement::Dnat { address: "fd00::1".parse().unwrap(), port: Some(80) };
    table.chains.insert(
        "prerouting".into(),
        Chain {
            base: Some(base),
            rules: vec![Rule::new(vec![Statement::SetMarkBits(0x4000), dnat]).comment("for people")],
        },
    );
    let expected = "\
table inet weft-test {
	map alive {
		type ipv6_addr . inet_proto : verdict
		flags timeout
		timeout 1s500ms
	}

	set ports {
		type inet_service
		elements = {
			3,
			7,
			443,
		}
	}

	chain prerouting {
		type nat hook prerouting priority -105; policy accept;
		meta mark set meta mark | 0x00004000 dnat ip6 to [fd00::1]:80 comment \"for people\"
	}
}
";
    assert_eq!(table.to_string(), expected);
}
