use weft_model::{ObjectRef, Severity};

use super::*;

fn notice(name: &str, message: &str) -> Notice {
    Notice::new(ObjectRef::new("Service", "default", name), Severity::Warning, "InvalidField", message)
}

fn after(start: Instant, seconds: u64) -> Instant {
    start + Duration::from_secs(seconds)
}

#[test]
fn a_standing_notice_is_written_once_it_has_settled_and_again_before_it_is_forgotten() {
    let (mut outbox, start) = (Outbox::new(1), Instant::now());
    let standing = BTreeSet::from([notice("web", "port 0")]);
    assert_eq!(outbox.due(&standing, start), []);
    let due = outbox.due(&standing, after(start, 4));
    assert_eq!(due.len(), 1);
    outbox.done(&due[0], after(start, 4));
    assert_eq!(outbox.due(&standing, after(start, 900)), []);
    assert_eq!(outbox.due(&standing, after(start, 904)), due, "under the same name");
}

#[test]
fn what_is_mended_soon_is_never_written() {
    let (mut outbox, start) = (Outbox::new(1), Instant::now());
    let standing = BTreeSet::from([notice("web", "port 0")]);
    outbox.due(&standing, start);
    outbox.due(&BTreeSet::new(), after(start, 2));
    outbox.due(&standing, after(start, 3));
    assert_eq!(outbox.due(&standing, after(start, 6)), []);
}

#[test]
fn all_nodes_give_a_standing_notice_one_name_and_each_passing_one_its_own() {
    let start = Instant::now();
    let standing = BTreeSet::from([notice("web", "port 0")]);
    let names: BTreeSet<_> = [1, 2]
        .map(|life| {
            let mut outbox = Outbox::new(life);
            outbox.due(&standing, start);
            outbox.due(&standing, after(start, 4))[0].name("uid")
        })
        .into();
    assert_eq!(names.len(), 1);
    let passing: BTreeSet<_> = [1, 2]
        .map(|life| {
            let mut outbox = Outbox::new(life);
            outbox.pass(notice("web", "port 0"), start);
            outbox.pass(notice("web", "port 0"), start);
            outbox.due(&BTreeSet::new(), start).into_iter().map(|due| due.name("uid")).collect::<Vec<_>>()
        })
        .concat()
        .into_iter()
        .collect();
    assert_eq!(passing.len(), 4);
}

#[test]
fn an_object_made_again_under_its_name_is_told_anew() {
    let due = Due::standing(notice("web", "port 0"));
    assert_ne!(due.name("first"), due.name("second"));
}

#[test]
fn another_message_object_or_severity_is_another_event() {
    let base = notice("web", "port 0");
    let normal = Notice { severity: Severity::Normal, ..base.clone() };
    let names: BTreeSet<_> = [base, notice("web", "port 1"), notice("api", "port 0"), normal]
        .iter()
        .map(|notice| name(notice, ""))
        .collect();
    assert_eq!(names.len(), 4);
}

#[test]
fn passing_notices_of_one_object_are_limited_and_others_are_not() {
    let (mut outbox, start) = (Outbox::new(1), Instant::now());
    for index in 0..30 {
        outbox.pass(notice("loud", &format!("denied {index}")), start);
    }
    outbox.pass(notice("quiet", "denied"), start);
    assert_eq!(outbox.due(&BTreeSet::new(), start).len(), OF_ONE_OBJECT + 1);
    outbox.pass(notice("loud", "denied later"), after(start, 601));
    assert_eq!(outbox.due(&BTreeSet::new(), start).len(), OF_ONE_OBJECT + 2);
}

#[test]
fn after_a_failure_nothing_is_lost_and_nothing_is_due_for_a_while() {
    let (mut outbox, start) = (Outbox::new(1), Instant::now());
    outbox.pass(notice("web", "denied"), start);
    outbox.wait(after(start, 10));
    assert_eq!(outbox.due(&BTreeSet::new(), after(start, 9)), []);
    let due = outbox.due(&BTreeSet::new(), after(start, 10));
    assert_eq!(due.len(), 1);
    outbox.done(&due[0], after(start, 10));
    assert_eq!(outbox.due(&BTreeSet::new(), after(start, 11)), []);
}

#[test]
fn a_flood_of_problems_is_cut() {
    let (mut outbox, start) = (Outbox::new(1), Instant::now());
    let standing: BTreeSet<_> = (0..2_000).map(|index| notice(&format!("web-{index}"), "port 0")).collect();
    outbox.due(&standing, start);
    assert_eq!(outbox.due(&standing, after(start, 5)).len(), STANDING);
}

#[test]
fn passing_notices_do_not_pile_up_while_the_server_is_away() {
    let (mut outbox, start) = (Outbox::new(1), Instant::now());
    for index in 0..2_000 {
        outbox.pass(notice(&format!("pod-{index}"), "denied"), start);
    }
    assert_eq!(outbox.due(&BTreeSet::new(), start).len(), PASSING);
}

#[test]
fn names_of_events_are_names_of_objects() {
    let long = "a".repeat(253);
    for object in ["web", &long, "web.example.", &format!("{}-{}", "a".repeat(235), "b".repeat(17))] {
        let name = name(&notice(object, "port 0"), "");
        assert!(name.len() <= NAME_BYTES, "{name}");
        assert!(!name.contains("..") && !name.contains("-."), "{name}");
    }
}
