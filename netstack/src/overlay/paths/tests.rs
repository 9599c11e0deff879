//! One path in simulated time, against a network that drops what is larger than it carries.

use super::*;

struct Way {
    path: Path,
    now: Instant,
    /// Bytes of the largest packet that comes through; `None` is a node that is away.
    carries: Option<u32>,
    /// Every so many questions one is lost whatever its size; 0 is never.
    loses_each: usize,
    asked: Vec<u32>,
}

impl Way {
    fn new(carries: Option<u32>) -> Self {
        let now = Instant::now();
        Self { path: Path::new(1420, None, now), now, carries, loses_each: 0, asked: Vec::new() }
    }

    fn pass(&mut self, duration: Duration) {
        let until = self.now + duration;
        while self.now < until {
            if let Some(question) = self.path.step(self.now) {
                self.asked.push(question.bytes);
                let unlucky = self.loses_each > 0 && self.asked.len().is_multiple_of(self.loses_each);
                if !unlucky && self.carries.is_some_and(|most| question.bytes <= most) {
                    assert!(!self.path.hear(question.nonce ^ 1, self.now), "an answer to nothing");
                    assert!(self.path.hear(question.nonce, self.now));
                }
            }
            self.now += Duration::from_millis(20);
        }
    }
}

#[test]
fn a_whole_path_costs_two_packets_each_half_minute() {
    let mut way = Way::new(Some(1420));
    way.pass(Duration::from_secs(59));
    assert_eq!((way.path.narrow, way.asked), (None, vec![128, 1420, 128, 1420]));
}

#[test]
fn a_narrow_path_is_found_to_the_grain_and_forgotten_when_it_is_whole_again() {
    for carries in [128, 576, 1000, 1279, 1280, 1372, 1404, 1419] {
        let mut way = Way::new(Some(carries));
        way.pass(Duration::from_secs(25));
        let narrow = way.path.narrow.unwrap();
        assert!(narrow <= carries && narrow + GRAIN > carries, "{narrow} of {carries}");
        way.carries = Some(1420);
        way.pass(Duration::from_secs(31));
        assert_eq!(way.path.narrow, None, "{carries}");
    }
}

#[test]
fn a_node_that_leaves_at_any_moment_is_not_called_narrow() {
    for millis in (0..20_000).step_by(100) {
        let mut way = Way::new(Some(1300));
        way.pass(Duration::from_millis(millis));
        let before = way.path.narrow;
        way.carries = None;
        way.pass(Duration::from_secs(60));
        assert_eq!(way.path.narrow, before, "left after {millis} ms");
        assert!(before.is_none_or(|narrow| narrow > 1280));
    }
}

#[test]
fn what_is_known_stays_while_the_node_is_away() {
    let mut way = Way::new(None);
    way.path = Path::new(1420, Some(1300), way.now);
    way.pass(Duration::from_secs(300));
    assert_eq!(way.path.narrow, Some(1300));
    let a_minute = way.asked.len() / 5;
    assert!((12..=18).contains(&a_minute) && way.asked.iter().all(|bytes| *bytes == 128), "{a_minute}");
}

#[test]
fn single_losses_make_no_path_narrow() {
    let mut way = Way::new(Some(1420));
    way.loses_each = 3;
    way.pass(Duration::from_secs(600));
    assert_eq!(way.path.narrow, None);
}

#[test]
fn another_device_is_looked_at_at_once() {
    let mut way = Way::new(Some(8920));
    way.pass(Duration::from_secs(2));
    way.asked.clear();
    way.path.look_again(8920, way.now);
    way.pass(Duration::from_secs(1));
    assert_eq!((way.path.narrow, way.asked), (None, vec![128, 8920]));
}
