use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

type Numbers = SharedMap<u16, u8>;

#[derive(Clone, Debug)]
enum Step {
    Insert(u16, u8),
    Remove(u16),
    Increment(u16),
    /// Another holds all pages from now on.
    Share,
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => (0..500u16, any::<u8>()).prop_map(|(key, value)| Step::Insert(key, value)),
        4 => (0..500u16).prop_map(Step::Remove),
        2 => (0..500u16).prop_map(Step::Increment),
        1 => Just(Step::Share),
    ]
}

/// A map that is like `model` and kept as its picture says.
fn is_sound(map: &Numbers, model: &BTreeMap<u16, u8>) {
    assert!(map.iter().eq(model.iter()), "{map:?} {model:?}");
    assert_eq!((map.len(), map.is_empty()), (model.len(), model.is_empty()));
    assert!(map.pages.iter().all(|page| (1..=MOST).contains(&page.len())));
    let neighbours = || map.pages.iter().zip(map.pages.iter().skip(1));
    assert!(neighbours().all(|(one, next)| one.len() + next.len() > FEW), "small pages are joined");
}

fn naive_differences(
    one: &BTreeMap<u16, u8>,
    other: &BTreeMap<u16, u8>,
) -> Vec<(u16, Option<u8>, Option<u8>)> {
    let keys: std::collections::BTreeSet<u16> = one.keys().chain(other.keys()).copied().collect();
    let both = keys.into_iter().map(|key| (key, one.get(&key).copied(), other.get(&key).copied()));
    both.filter(|(_, one, other)| one != other).collect()
}

fn differences(one: &Numbers, other: &Numbers) -> Vec<(u16, Option<u8>, Option<u8>)> {
    let all = one.differences(other, |a, b| a == b);
    all.map(|(key, one, other)| (*key, one.copied(), other.copied())).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    #[test]
    fn it_is_a_sorted_map_and_copies_stay_as_they_were(
        first in proptest::collection::btree_map(0..500u16, any::<u8>(), 0..300),
        steps in proptest::collection::vec(any_step(), 0..600),
    ) {
        let mut model = first;
        let mut map: Numbers = model.iter().map(|(key, value)| (*key, *value)).collect();
        let mut copies = vec![(map.clone(), model.clone())];
        for step in steps {
            match step {
                Step::Insert(key, value) => prop_assert_eq!(map.insert(key, value), model.insert(key, value)),
                Step::Remove(key) => prop_assert_eq!(map.remove(&key), model.remove(&key)),
                Step::Increment(key) => {
                    let counts = [map.get_mut(&key), model.get_mut(&key)];
                    for count in counts.into_iter().flatten() {
                        *count = count.wrapping_add(1);
                    }
                }
                Step::Share => copies.push((map.clone(), model.clone())),
            }
        }
        is_sound(&map, &model);
        for key in 0..500 {
            prop_assert_eq!(map.get(&key), model.get(&key));
            prop_assert!(map.range(key..).eq(model.range(key..)));
        }
        let mut follower = Numbers::new();
        for (copy, then) in copies {
            prop_assert!(copy.iter().eq(then.iter()));
            prop_assert_eq!(differences(&copy, &map), naive_differences(&then, &model));
            prop_assert_eq!(copy == map, then == model);
            follower.clone_from(&copy);
            prop_assert_eq!(&follower, &copy);
        }
        follower.clone_from(&map);
        is_sound(&follower, &model);
    }

    #[test]
    fn of_one_key_the_last_counts(entries in proptest::collection::vec((0..100u16, any::<u8>()), 0..200)) {
        let model: BTreeMap<u16, u8> = entries.iter().copied().collect();
        is_sound(&entries.into_iter().collect(), &model);
    }

    #[test]
    fn a_default_stands_where_nothing_did(keys in proptest::collection::vec("[a-z]{1,2}", 0..200)) {
        let (mut map, mut model) = (SharedMap::<Arc<str>, usize>::new(), BTreeMap::<Arc<str>, usize>::new());
        for key in keys {
            *map.get_or_default(key.as_str().into()) += 1;
            *model.entry(key.into()).or_default() += 1;
        }
        prop_assert!(map.iter().eq(&model));
    }
}

/// Of ten thousand.
fn large() -> SharedMap<u32, Arc<u32>> {
    (0..10_000).map(|number| (number, Arc::new(number))).collect()
}

#[test]
fn after_a_change_all_but_a_page_is_shared() {
    let before = large();
    let mut after = before.clone();
    after.insert(5_000, Arc::new(7));
    let shared = before.pages.iter().zip(&after.pages).filter(|(one, same)| Arc::ptr_eq(one, same));
    assert_eq!((shared.count(), after.pages.len()), (158, 159));
    let compared = std::cell::Cell::new(0);
    let same = |one: &Arc<u32>, other: &Arc<u32>| {
        compared.set(compared.get() + 1);
        one == other
    };
    let changed: Vec<u32> = before.differences(&after, same).map(|(key, ..)| *key).collect();
    assert_eq!((changed, compared.get()), (vec![5_000], MOST));
}

#[test]
fn after_a_page_was_split_what_follows_is_still_passed_over() {
    let before: SharedMap<u32, ()> = (0..10_000).map(|number| (number * 2, ())).collect();
    let mut after = before.clone();
    after.insert(6_301, ());
    after.remove(&12_000);
    let compared = std::cell::Cell::new(0);
    let same = |(): &(), (): &()| {
        compared.set(compared.get() + 1);
        true
    };
    let changed: Vec<u32> = before.differences(&after, same).map(|(key, ..)| *key).collect();
    assert_eq!((changed, compared.get()), (vec![6_301, 12_000], 2 * MOST - 1));
}

#[test]
fn what_comes_in_order_leaves_full_pages_behind() {
    let mut map = SharedMap::new();
    (0..10_000u32).for_each(|number| assert_eq!(map.insert(number, ()), None));
    assert_eq!(map.pages.len(), 10_000usize.div_ceil(MOST));
}
