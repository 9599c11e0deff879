//! What differs between two plans' groups: pure, and cheap where both share values.

use std::sync::Arc;

use crate::zone::{Group, GroupKey, Groups};

/// One group that is not the same before and after.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change<'a> {
    pub(crate) key: &'a Arc<GroupKey>,
    pub(crate) before: Option<&'a Arc<Group>>,
    pub(crate) after: Option<&'a Arc<Group>>,
}

/// Groups that are one value in both are passed over; equal groups that are not may be told as changed.
pub(crate) fn changed_groups<'a>(before: &'a Groups, after: &'a Groups) -> Vec<Change<'a>> {
    let changes = before.differences(after, Arc::ptr_eq);
    changes.map(|(key, before, after)| Change { key, before, after }).collect()
}

/// When the changes were made that `after` has and `before` has not, in milliseconds since the epoch; of headless Services.
pub(crate) fn newly_triggered(before: &Groups, after: &Groups) -> Vec<i64> {
    let triggered = |group: Option<&Arc<Group>>| group.and_then(|group| group.triggered_millis);
    let changes = changed_groups(before, after).into_iter();
    let newer = changes.filter(|change| triggered(change.after) > triggered(change.before));
    newer.filter_map(|change| triggered(change.after)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_change_is_told_and_the_end_of_a_service_is_none() {
        let key = |name: &str| Arc::new(GroupKey::Namespace(name.to_owned()));
        let at = |triggered_millis| {
            let mut group = Group::default();
            group.triggered_millis = triggered_millis;
            Arc::new(group)
        };
        let groups = |of: [(&str, Option<i64>); 3]| of.map(|(name, millis)| (key(name), at(millis))).into();
        let before: Groups = groups([("a", Some(5)), ("b", None), ("gone", Some(6))]);
        let after: Groups = groups([("a", Some(7)), ("b", None), ("new", Some(8))]);
        assert_eq!(newly_triggered(&before, &after), [7, 8]);
        assert_eq!(newly_triggered(&after, &after), Vec::<i64>::new());
    }

    #[test]
    fn added_changed_and_removed_groups_are_told_and_shared_ones_are_not() {
        let key = |name: &str| Arc::new(GroupKey::Namespace(name.to_owned()));
        let shared = Arc::new(Group::default());
        let fresh = || Arc::new(Group::default());
        let before = Groups::from([(key("a"), shared.clone()), (key("b"), fresh()), (key("d"), fresh())]);
        let after =
            Groups::from([(key("a"), shared), (key("c"), fresh()), (key("d"), fresh()), (key("e"), fresh())]);
        let told: Vec<(String, bool, bool)> = changed_groups(&before, &after)
            .iter()
            .map(|change| (change.key.to_string(), change.before.is_some(), change.after.is_some()))
            .collect();
        let expected = [("b", true, false), ("c", false, true), ("d", true, true), ("e", false, true)];
        assert_eq!(told, expected.map(|(name, before, after)| (format!("Namespace {name}"), before, after)));
    }
}
