//! Two peers, simulated time, and a wire that can lose datagrams.

use super::*;
use crate::overlay::tunnel::allowed_ips::addresses;
use crate::overlay::tunnel::handover::{Clock, Unusable};
use crate::overlay::tunnel::macs::{Admission, Admissions};
use crate::overlay::tunnel::message::{Message, parse};

/// One side: its peer and what came out of it.
struct Side {
    identity: Arc<Identity>,
    peer: Peer,
    /// One a family, IPv4 first.
    addresses: [SocketAddr; 2],
    received: Vec<Vec<u8>>,
    /// Types of the messages it sent, with the second of sending.
    sent: Vec<(u64, u32)>,
}

struct World {
    start: Instant,
    elapsed: Duration,
    sides: [Side; 2],
    /// Datagrams of this side are lost.
    lost: [bool; 2],
    /// Nothing that is sent there arrives.
    closed: Vec<SocketAddr>,
}

impl World {
    fn new() -> Self {
        let identities = [Arc::new(Identity::new([1; 32])), Arc::new(Identity::new([2; 32]))];
        let addresses = [1, 2].map(|n| {
            [format!("192.0.2.{n}:51820"), format!("[2001:db8::{n}]:51820")].map(|text| text.parse().unwrap())
        });
        let side = |own: usize| {
            let other = 1 - own;
            let mut peer = Peer::new(identities[own].clone(), identities[other].public, 5);
            peer.set_endpoint(Some(addresses[other][0]));
            Side {
                identity: identities[own].clone(),
                peer,
                addresses: addresses[own],
                received: Vec::new(),
                sent: Vec::new(),
            }
        };
        Self {
            start: Instant::now(),
            elapsed: Duration::ZERO,
            sides: [side(0), side(1)],
            lost: [false, false],
            closed: Vec::new(),
        }
    }

    fn now(&self) -> Now {
        Now { monotonic: self.start + self.elapsed, wall: Duration::from_secs(1_800_000_000) + self.elapsed }
    }

    /// Carries what `from` sent, and every answer, until nothing is on the wire.
    fn carry(&mut self, from: usize, out: Outbox) {
        let mut wire: VecDeque<_> = out.into_iter().map(|(to, datagram)| (from, to, datagram)).collect();
        while let Some((from, to, datagram)) = wire.pop_front() {
            let kind = u32_at(&datagram, 0).unwrap();
            self.sides[from].sent.push((self.elapsed.as_secs(), kind));
            let arrives = self.sides[1 - from].addresses.contains(&to) && !self.closed.contains(&to);
            if arrives && !self.lost[from] {
                let source = self.sides[from].addresses[usize::from(to.is_ipv6())];
                let answers = self.deliver(from, source, datagram);
                wire.extend(answers.into_iter().map(|(to, datagram)| (1 - from, to, datagram)));
            }
        }
    }

    fn deliver(&mut self, from: usize, source: SocketAddr, mut datagram: Vec<u8>) -> Outbox {
        let (now, mut out) = (self.now(), Outbox::new());
        let side = &mut self.sides[1 - from];
        match parse(&datagram).unwrap() {
            Message::Initiation(message) => {
                if let Ok(initiation) = noise::read_initiation(&side.identity, message) {
                    side.peer.consume_initiation(initiation, source, now, &mut out);
                }
            }
            Message::Response(message) => {
                side.peer.consume_response(message, source, now, &mut out);
            }
            Message::CookieReply(message) => {
                side.peer.consume_cookie(message, now.monotonic);
            }
            Message::Data { receiver, counter } => {
                let Some(session) = side.peer.session(receiver, now.monotonic) else { return out };
                let mut opened = vec![(counter, 0..datagram.len())];
                session.open(&mut opened, &mut datagram);
                if let Some((_, place)) = opened.pop() {
                    let packet = datagram[place].to_vec();
                    let bytes = datagram.len() as u64;
                    side.peer.note_received(&session, bytes, !packet.is_empty(), source, now, &mut out);
                    if !packet.is_empty() {
                        side.received.push(packet);
                    }
                }
            }
        }
        out
    }

    /// Side `from` sends one packet whose payload is `mark`.
    fn send(&mut self, from: usize, mark: u8) {
        let (now, mut out) = (self.now(), Outbox::new());
        let mut packet = vec![mark; 32];
        packet[0] = 0x45;
        packet[2..4].copy_from_slice(&[0, 32]);
        match self.sides[from].peer.reserve(1, true, now, &mut out) {
            Some(reservation) => {
                let mut datagram = vec![0; DATA_HEADER_LEN + 32 + TAG_LEN];
                datagram[DATA_HEADER_LEN..DATA_HEADER_LEN + 32].copy_from_slice(&packet);
                reservation.session.seal(reservation.first, std::iter::once(datagram.as_mut_slice()));
                out.push((reservation.endpoint, datagram));
            }
            None => self.sides[from].peer.enqueue(packet, now, &mut out),
        }
        self.carry(from, out);
    }

    /// Lets time pass in steps of 100 ms, ticking both sides whenever they are due.
    fn pass(&mut self, duration: Duration) {
        let until = self.elapsed + duration;
        while self.elapsed < until {
            self.elapsed += Duration::from_millis(100);
            let now = self.now();
            for side in 0..2 {
                let mut out = Outbox::new();
                if self.sides[side].peer.next_wake().is_some_and(|at| at <= now.monotonic) {
                    self.sides[side].peer.tick(now, &mut out);
                }
                self.carry(side, out);
            }
        }
    }

    /// The process of `side` ends in order, and another goes on after `gap`.
    fn hand_over(&mut self, side: usize, gap: Duration) {
        let state = self.sides[side].peer.state(&Clock::leaving(self.now().monotonic));
        let read: PeerState = serde_json::from_slice(&serde_json::to_vec(&state).unwrap()).unwrap();
        assert_eq!(read, state);
        self.elapsed += gap;
        self.resume(side, read, gap).unwrap();
    }

    fn resume(&mut self, side: usize, state: PeerState, gap: Duration) -> Result<(), Unusable> {
        let identity = self.sides[side].identity.clone();
        let mut peer = Peer::new(identity.clone(), self.sides[1 - side].identity.public, 5);
        let known = |key: &WgPublicKey| Some(identity.clone()).filter(|identity| identity.public == *key);
        peer.resume(state, known, &Clock::arriving(self.now().monotonic, gap)?)?;
        self.sides[side].peer = peer;
        Ok(())
    }

    fn marks(&self, side: usize) -> Vec<u8> {
        self.sides[side].received.iter().map(|packet| packet[31]).collect()
    }

    fn sent_of(&self, side: usize, kind: u32) -> Vec<u64> {
        self.sides[side].sent.iter().filter(|(_, sent)| *sent == kind).map(|(at, _)| *at).collect()
    }
}

const INITIATION: u32 = 1;
const DATA: u32 = 4;

#[test]
fn the_packet_that_asks_for_a_handshake_arrives_behind_it() {
    let mut world = World::new();
    world.send(0, 7);
    assert_eq!(world.marks(1), [7]);
    assert!(addresses(&world.sides[1].received[0]).is_some());
    world.send(1, 8);
    assert_eq!(world.marks(0), [8]);
    assert_eq!(world.sent_of(1, INITIATION), [0u64; 0], "the answer uses the session of the initiator");
}

/// Both send each second for 250 seconds, which pass as `pass` says: the initiator renews the session, and nothing is lost.
fn is_renewed_in_use(pass: impl Fn(&mut World, u8)) {
    let mut world = World::new();
    for second in 0..250u8 {
        world.send(0, second);
        world.send(1, second);
        pass(&mut world, second);
    }
    let all: Vec<u8> = (0..250).collect();
    assert_eq!((world.marks(0), world.marks(1)), (all.clone(), all));
    assert_eq!(world.sent_of(0, INITIATION), [0, 120, 240]);
    assert_eq!(world.sent_of(1, INITIATION), [0u64; 0]);
}

#[test]
fn the_initiator_renews_a_session_in_use_after_two_minutes_without_a_loss() {
    is_renewed_in_use(|world, _| world.pass(Duration::from_secs(1)));
}

#[test]
fn an_initiator_that_only_receives_renews_the_session_in_time() {
    let mut world = World::new();
    world.send(0, 1);
    for second in 0..200u8 {
        // Side 0 sends only keepalives, which renew an aged session as data does.
        world.send(1, second);
        world.pass(Duration::from_secs(1));
    }
    assert_eq!(world.marks(0), (0..200).collect::<Vec<u8>>());
    assert_eq!(world.sent_of(0, INITIATION).len(), 2);
}

#[test]
fn a_session_of_three_minutes_neither_sends_nor_receives() {
    let mut world = World::new();
    world.send(0, 1);
    let index = world.sides[1].peer.current.as_ref().unwrap().local_index;
    world.elapsed += Duration::from_secs(179);
    assert!(world.sides[1].peer.session(index, world.now().monotonic).is_some());
    world.elapsed += Duration::from_secs(1);
    assert!(world.sides[1].peer.session(index, world.now().monotonic).is_none());
    world.lost[0] = true;
    world.send(0, 2);
    assert_eq!(world.sides[0].sent.last(), Some(&(180, INITIATION)));
    assert_eq!(world.marks(1), [1]);
}

#[test]
fn attempts_repeat_every_five_seconds_and_end_after_ninety() {
    let mut world = World::new();
    world.lost = [true, true];
    world.send(0, 1);
    world.pass(Duration::from_secs(200));
    let attempts = world.sent_of(0, INITIATION);
    assert!((16..=19).contains(&attempts.len()), "{attempts:?}");
    assert!(attempts.windows(2).all(|pair| (5..=6).contains(&(pair[1] - pair[0]))), "{attempts:?}");
    assert!(*attempts.last().unwrap() <= 96);
    assert!(world.sides[0].peer.queue.is_empty(), "what waited is given up with the attempt");
    world.lost = [false, false];
    world.send(0, 2);
    assert_eq!(world.marks(1), [2]);
}

#[test]
fn a_receiver_with_nothing_to_say_answers_with_a_keepalive_after_ten_seconds() {
    let mut world = World::new();
    world.send(0, 1);
    world.pass(Duration::from_secs(9));
    assert_eq!(world.sent_of(1, DATA), [0u64; 0]);
    world.pass(Duration::from_secs(2));
    assert_eq!(world.sent_of(1, DATA), [10]);
    world.pass(Duration::from_secs(60));
    assert_eq!(world.sent_of(1, DATA), [10], "a keepalive is not answered");
}

#[test]
fn silence_after_data_starts_a_new_handshake_after_fifteen_seconds() {
    let mut world = World::new();
    world.send(0, 1);
    world.pass(Duration::from_secs(20));
    world.lost[1] = true;
    world.send(0, 2);
    world.pass(Duration::from_secs(16));
    assert_eq!(world.sent_of(0, INITIATION), [0, 35]);
}

#[test]
fn persistent_keepalives_keep_their_interval() {
    let mut world = World::new();
    let now = world.now().monotonic;
    world.sides[0].peer.set_keepalive(Some(Duration::from_secs(25)), now);
    world.pass(Duration::from_secs(80));
    assert_eq!(world.sent_of(0, INITIATION), [25]);
    assert_eq!(world.sent_of(0, DATA), [25, 50, 75]);
}

#[test]
fn keys_are_forgotten_after_nine_minutes() {
    let mut world = World::new();
    world.send(0, 1);
    world.pass(Duration::from_secs(541));
    for side in &world.sides {
        assert!(side.peer.current.is_none() && side.peer.previous.is_empty() && side.peer.next.is_none());
        assert_eq!(side.peer.next_wake(), None);
    }
}

/// The same initiation twice, and what happens `between`: the second is not answered.
fn a_replay_is_refused(between: impl Fn(&mut World)) {
    let mut world = World::new();
    let (mut out, now) = (Outbox::new(), world.now());
    world.sides[0].peer.start_handshake(now, &mut out);
    let replay = out.clone();
    world.carry(0, out);
    let answers = world.sides[1].sent.len();
    between(&mut world);
    world.carry(0, replay);
    assert_eq!(world.sides[1].sent.len(), answers);
}

#[test]
fn a_replayed_initiation_is_refused() {
    a_replay_is_refused(|world| world.elapsed += Duration::from_secs(1));
}

#[test]
fn the_endpoint_follows_authentic_packets() {
    let mut world = World::new();
    world.send(0, 1);
    let moved: SocketAddr = "192.0.2.7:1234".parse().unwrap();
    world.sides[0].addresses[0] = moved;
    world.send(0, 2);
    assert_eq!(world.sides[1].peer.endpoint(), Some(moved));
}

/// Both know both addresses of the other, IPv4 first.
fn with_two_addresses() -> World {
    let mut world = World::new();
    let now = world.now();
    for side in 0..2 {
        let candidates = world.sides[1 - side].addresses.to_vec();
        let mut out = Outbox::new();
        world.sides[side].peer.set_candidates(candidates, now, &mut out);
        assert!(out.is_empty(), "nobody is called before there is something to say");
    }
    world
}

#[test]
fn without_an_answer_a_peer_is_called_everywhere_a_second_later() {
    let mut world = with_two_addresses();
    let [v4, v6] = world.sides[1].addresses;
    world.closed = vec![v4];
    world.send(0, 7);
    world.pass(Duration::from_millis(900));
    assert_eq!((world.marks(1), world.sent_of(0, INITIATION)), (vec![], vec![0]));
    world.pass(Duration::from_millis(100));
    assert_eq!((world.marks(1), world.sent_of(0, INITIATION)), (vec![7], vec![0, 1, 1]));
    assert_eq!(world.sides[0].peer.endpoint(), Some(v6));
    assert_eq!(world.sides[1].peer.endpoint(), Some(world.sides[0].addresses[1]), "both ways are one");
    world.pass(Duration::from_secs(60));
    assert_eq!(world.sent_of(0, INITIATION), [0, 1, 1], "who has answered is not called again");
}

#[test]
fn a_peer_that_comes_up_late_is_met_at_the_best_of_its_addresses() {
    let mut world = with_two_addresses();
    world.lost = [true, true];
    world.send(0, 7);
    world.pass(Duration::from_millis(900));
    world.lost = [false, false];
    world.pass(Duration::from_millis(100));
    assert_eq!(world.marks(1), [7]);
    assert_eq!(world.sides[0].peer.endpoint(), Some(world.sides[1].addresses[0]));
}

#[test]
fn an_answer_within_a_second_leaves_the_other_addresses_alone() {
    let mut world = with_two_addresses();
    world.send(0, 7);
    world.pass(Duration::from_secs(60));
    assert_eq!(world.sent_of(0, INITIATION), [0]);
    assert_eq!(world.sides[0].peer.endpoint(), Some(world.sides[1].addresses[0]));
}

#[test]
fn a_detour_ends_with_the_session_that_took_it_and_no_packet_waits_for_that() {
    let mut world = with_two_addresses();
    let [v4, v6] = world.sides[1].addresses;
    world.closed = vec![v4];
    world.send(0, 0);
    world.pass(Duration::from_secs(2));
    let mut marks = vec![0];
    for mark in 1..250 {
        if mark == 100 {
            world.closed.clear();
        }
        world.send(0, mark);
        marks.push(mark);
        assert_eq!(world.marks(1), marks);
        let before = if mark < 119 { v6 } else { world.sides[0].peer.endpoint().unwrap() };
        assert_eq!(world.sides[0].peer.endpoint(), Some(before));
        world.pass(Duration::from_secs(1));
    }
    assert_eq!(world.sides[0].peer.endpoint(), Some(v4));
    assert_eq!(world.sides[1].peer.endpoint(), Some(world.sides[0].addresses[0]));
}

#[test]
fn a_better_endpoint_is_called_at_once_while_the_session_goes_on_where_it_is() {
    let mut world = with_two_addresses();
    world.send(0, 1);
    world.elapsed += Duration::from_secs(10);
    let [v4, v6] = world.sides[1].addresses;
    let (now, mut out) = (world.now(), Outbox::new());
    world.sides[0].peer.set_candidates(vec!["192.0.2.99:1".parse().unwrap(), v6], now, &mut out);
    assert_eq!(world.sides[0].peer.endpoint(), Some(v4));
    world.carry(0, out);
    world.send(0, 2);
    assert_eq!(world.marks(1), [1, 2]);
    world.pass(Duration::from_secs(1));
    let at = world.sides[0].peer.endpoint().unwrap();
    assert!([v4, v6].contains(&at), "{at}: nobody answers at the best one");
    world.elapsed += Duration::from_secs(1);
    let (now, mut out) = (world.now(), Outbox::new());
    world.sides[0].peer.set_candidates(vec![v6, v4], now, &mut out);
    world.carry(0, out);
    assert_eq!(world.sides[0].peer.endpoint(), Some(v6));
}

#[test]
fn a_session_that_was_handed_over_stays_where_it_is_and_nobody_is_called() {
    let mut world = with_two_addresses();
    world.closed = vec![world.sides[1].addresses[0]];
    world.send(0, 1);
    world.pass(Duration::from_secs(2));
    world.closed.clear();
    world.hand_over(0, Duration::from_millis(100));
    let (candidates, now, mut out) = (world.sides[1].addresses.to_vec(), world.now(), Outbox::new());
    world.sides[0].peer.set_candidates(candidates, now, &mut out);
    assert_eq!((out, world.sides[0].peer.endpoint()), (vec![], Some(world.sides[1].addresses[1])));
}

#[test]
fn a_node_that_moved_is_heard_from_where_it_is_at_once() {
    let mut world = World::new();
    world.send(0, 1);
    world.elapsed += Duration::from_secs(10);
    let moved = "192.0.2.77:51820".parse().unwrap();
    world.sides[0].addresses[0] = moved;
    let (now, mut out) = (world.now(), Outbox::new());
    world.sides[0].peer.renew(now, &mut out);
    world.sides[0].peer.renew(now, &mut out);
    assert_eq!(out.len(), 1, "once is enough");
    world.carry(0, out);
    assert_eq!(world.sides[1].peer.endpoint(), Some(moved));
    world.send(1, 2);
    assert_eq!(world.marks(0), [2]);
}

#[test]
fn both_may_start_at_the_same_moment() {
    let mut world = World::new();
    let (now, mut ours, mut theirs) = (world.now(), Outbox::new(), Outbox::new());
    world.sides[0].peer.start_handshake(now, &mut ours);
    world.sides[1].peer.start_handshake(now, &mut theirs);
    world.carry(0, ours);
    world.carry(1, theirs);
    world.send(0, 1);
    world.send(1, 2);
    assert_eq!((world.marks(1), world.marks(0)), (vec![1], vec![2]));
}

#[test]
fn a_peer_that_lost_everything_is_back_with_its_first_packet() {
    let mut world = World::new();
    world.send(0, 1);
    world.elapsed += Duration::from_secs(1);
    let fresh = World::new();
    let [reborn, _] = fresh.sides;
    world.sides[0] = reborn;
    world.send(0, 2);
    world.send(1, 3);
    assert_eq!((world.marks(1), world.marks(0)), (vec![1, 2], vec![3]));
}

#[test]
fn a_cookie_is_used_in_the_next_attempt() {
    let mut world = World::new();
    let (now, mut out) = (world.now(), Outbox::new());
    let bob = world.sides[1].identity.public;
    let mut admissions = Admissions::new(now.monotonic);
    admissions.set_keys([bob].into_iter());
    world.sides[0].peer.start_handshake(now, &mut out);
    let reply = loop {
        match admissions.judge(&out[0].1, world.sides[0].addresses[0], now.monotonic) {
            Admission::Reply(reply) => break reply,
            Admission::Process(_) => {}
            Admission::Drop => panic!("mac1 is right"),
        }
    };
    assert!(world.sides[0].peer.consume_cookie(&reply, now.monotonic));
    world.elapsed += Duration::from_millis(5400);
    let (later, mut retry) = (world.now(), Outbox::new());
    for _ in 0..100 {
        admissions.judge(&out[0].1, "192.0.2.9:9".parse().unwrap(), later.monotonic);
    }
    world.sides[0].peer.tick(later, &mut retry);
    let source = world.sides[0].addresses[0];
    assert_eq!(admissions.judge(&retry[0].1, source, later.monotonic), Admission::Process(bob));
}

const GAP: Duration = Duration::from_millis(300);

#[test]
fn a_session_goes_on_in_the_next_process_in_both_roles() {
    let mut world = World::new();
    for round in 0..10u8 {
        world.send(0, round);
        world.send(1, round);
        world.hand_over(usize::from(round % 2), GAP);
        if round % 3 == 0 {
            world.hand_over(usize::from((round + 1) % 2), GAP);
        }
    }
    let all: Vec<u8> = (0..10).collect();
    assert_eq!((world.marks(0), world.marks(1)), (all.clone(), all));
    assert_eq!((world.sent_of(0, INITIATION).len(), world.sent_of(1, INITIATION).len()), (1, 0));
    // The keepalive that confirmed the session is not there, since data did.
    let counters: Vec<u64> =
        world.sides.iter().map(|side| side.peer.current.as_ref().unwrap().standing().1).collect();
    assert_eq!(counters, [10, 10], "every counter was given once");
    assert!(world.sides.iter().all(|side| side.peer.sent_bytes > 0 && side.peer.received_bytes > 0));
    let [initiator, responder] = &world.sides;
    assert_eq!(initiator.peer.confirmed(), Some(initiator.identity.public));
    assert_eq!(initiator.peer.endpoint(), Some(responder.addresses[0]));
}

#[test]
fn what_one_process_received_is_a_replay_for_the_next() {
    let mut world = World::new();
    world.send(0, 1);
    let verdicts = |world: &World, counters: &[u64]| {
        let mut verdicts = Vec::new();
        let session = world.sides[1].peer.current.clone().unwrap();
        session.accept(counters.iter().copied(), |fresh| verdicts.push(fresh));
        verdicts
    };
    assert_eq!(verdicts(&world, &[0, 1, 3, 9000]), [true; 4]);
    world.hand_over(1, GAP);
    assert_eq!(
        verdicts(&world, &[0, 1, 3, 9000, 100, 8999, 9001]),
        [false, false, false, false, false, true, true]
    );
}

#[test]
fn an_initiation_that_one_process_answered_is_refused_by_the_next() {
    a_replay_is_refused(|world| world.hand_over(1, Duration::from_secs(1)));
}

#[test]
fn timers_go_on_through_the_gap() {
    let mut world = World::new();
    world.send(0, 1);
    world.pass(Duration::from_secs(4));
    world.hand_over(1, Duration::from_secs(3));
    world.pass(Duration::from_secs(2));
    assert_eq!(world.sent_of(1, DATA), [0u64; 0]);
    world.pass(Duration::from_secs(2));
    assert_eq!(world.sent_of(1, DATA), [10], "the keepalive is due ten seconds after the data");
}

#[test]
fn a_session_is_renewed_at_its_age_whatever_processes_it_saw() {
    is_renewed_in_use(|world, second| {
        world.pass(Duration::from_millis(900));
        world.hand_over(usize::from(second % 2), Duration::from_millis(100));
    });
}

#[test]
fn a_response_that_nobody_has_used_yet_is_good_in_the_next_process() {
    let mut world = World::new();
    // The initiator's first packet, which would confirm the session, is lost.
    let (mut out, now) = (Outbox::new(), world.now());
    world.sides[0].peer.start_handshake(now, &mut out);
    let source = world.sides[0].addresses[0];
    let answers = world.deliver(0, source, out.remove(0).1);
    assert!(world.sides[1].peer.next.is_some());
    world.hand_over(1, GAP);
    world.carry(1, answers);
    world.send(0, 5);
    world.send(1, 6);
    assert_eq!((world.marks(1), world.marks(0)), (vec![5], vec![6]));
    assert_eq!(world.sent_of(1, INITIATION), [0u64; 0]);
}

#[test]
fn what_waits_for_a_handshake_waits_on_in_the_next_process() {
    let mut world = World::new();
    world.lost = [true, true];
    world.send(0, 7);
    let state = world.sides[0].peer.state(&Clock::leaving(world.now().monotonic));
    assert!(state.is_being_greeted);
    world.hand_over(0, GAP);
    world.lost = [false, false];
    let (now, mut out) = (world.now(), Outbox::new());
    world.sides[0].peer.start_handshake(now, &mut out);
    world.carry(0, out);
    assert_eq!(world.marks(1), [7]);
}

#[test]
fn a_session_that_is_too_old_is_not_left() {
    let mut world = World::new();
    world.send(0, 1);
    world.hand_over(0, Duration::from_secs(179));
    assert!(world.sides[0].peer.current.is_some());
    world.elapsed += Duration::from_secs(1);
    world.hand_over(0, GAP);
    assert!(world.sides[0].peer.current.is_none());
    world.send(0, 2);
    assert_eq!(world.marks(1), [1, 2]);
}

#[test]
fn a_state_that_does_not_fit_is_refused_whole() {
    let mut world = World::new();
    world.send(0, 1);
    let state = world.sides[0].peer.state(&Clock::leaving(world.now().monotonic));
    let whole = serde_json::to_value(&state).unwrap();
    let mut refused = |path: &str, value: serde_json::Value| {
        let mut spoiled = whole.clone();
        *spoiled.pointer_mut(path).unwrap() = value;
        serde_json::from_value(spoiled).map_or(true, |state| world.resume(0, state, GAP).is_err())
    };
    assert!(refused("/current/window", "AAAA".into()));
    assert!(refused("/current/window", serde_json::Value::Null));
    assert!(refused("/current/local_index", 1.into()));
    assert!(refused("/current/send", "AAAA".into()));
    assert!(refused("/current/next_counter", (-1).into()));
    assert!(refused("/identity", WgPublicKey([9; 32]).to_string().into()));
    assert!(refused("/greatest_timestamp", "AAAA".into()));
    assert!(refused("/queue", "x".into()));
    world.send(0, 2);
    assert_eq!(world.marks(1), [1, 2], "the peer is as it was");
}
