//! The announcer: the owner of the kernel entries by which this node answers, and the only place here that knows time.
//!
//! ```text
//!  every 50 ms: hear who lives, hear the LAN -> elect -> for each address: ask -> claim and tell -> tell again
//!                                                     -> what another is to have: answer until his claim is heard, then withdraw
//! ```
//!
//! A peer whose kernel left four echoes in a row unanswered is dead, 0.45 s after its last answer at most, and lives again when it
//! answered for a second. After two he is in doubt: who would come after him asks the LAN already, and claims when he is dead. The kernels answer the echoes, so an agent that restarts moves nothing; what its kernel answers for when
//! it starts, it keeps.
//! What a node answers for it tells the others too (annotation of its Node), so that nobody gets an address that is still answered for.
//! Agents send the echoes, so who sends none for seconds has no agent, and others take over in order what his kernel answers for.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use weft_model::balancer::AnswersFor;
use weft_model::{NodeName, Notice, ObjectRef, Severity};
use weft_netstack::kernel::carrier::Carriers;
use weft_netstack::kernel::lan::{Arp, Heard, Icmp4, Icmp6, Mac};
use weft_netstack::kernel::nft::answers::{AnswerRules, Answers};
use weft_netstack::kernel::sysctl::Journal;
use weft_netstack::kernel::vip::Answering;
use weft_netstack::kube::Notices;
use weft_netstack::reconcile::{Applied, Applier, Trust, chain};

use super::elect::{elected, has_quorum, next_in_line};
use super::{Alive, Announced, Plan, elect, names};

/// One turn.
const TURN: Duration = Duration::from_millis(50);
/// Between two echoes to a peer.
const ECHO_TURNS: u64 = 2;
/// Between two tries to open a link that could not be opened.
const LINK_TURNS: u64 = 20;
/// Echoes without an answer, the last for a turn, after which a peer is in doubt, and dead; answers after which it lives again.
const DOUBTFUL_AFTER: u32 = 2;
const DEAD_AFTER: u32 = 4;
const ALIVE_AFTER: u32 = 10;
/// How long a node that was cut off, or just started, waits before it claims: until the others know that it lives, and so yield to its
/// claim. One that is claimed from a node that thinks the claimant dead is claimed back.
const BACK: Duration = Duration::from_millis(500);
const STARTED: Duration = Duration::from_millis(1500);
/// Two turns further apart than this: this agent did not run meanwhile, and so heard nobody.
const SLEPT: Duration = Duration::from_secs(1);
/// An agent that is not heard of for this long is no restart.
const AGENT_SILENT: Duration = Duration::from_secs(5);
/// Until a node that is to go silent does so although it heard no claim.
const YIELD: Duration = Duration::from_secs(2);
/// How long connections that began at the node before go on there.
const HANDOVER: Duration = Duration::from_secs(600);
/// Between two questions for the cards of the peers.
const CARDS_ASKED: Duration = Duration::from_millis(250);
/// Questions to the LAN before an address is claimed, one a turn.
const QUESTIONS: u32 = 3;
/// Somebody who answers for this long is no predecessor that is about to withdraw.
const CONTESTED: Duration = Duration::from_secs(3);
/// Until a contested address is asked for again.
const LATER: Duration = Duration::from_secs(5);
/// When a claim is told again: caches and switches may have missed it, and forget.
const TOLD_AGAIN: [Duration; 3] =
    [Duration::from_millis(200), Duration::from_secs(1), Duration::from_secs(2)];
const TOLD_PERIODICALLY: Duration = Duration::from_secs(30);
/// Least time between two changes of what the other nodes are told: each is a write to the API server.
const PUBLISHED_AGAIN: Duration = Duration::from_millis(500);
/// An object holds 256 KiB of annotations. What is beyond is not told, and may be given anew before it is withdrawn.
const PUBLISHED_AT_MOST: usize = 3_000;

/// What the announcer does, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    pub held: BTreeSet<IpAddr>,
    /// Addresses that somebody else answers for, with his link-layer address.
    pub contested: BTreeMap<IpAddr, String>,
    pub dead: BTreeSet<NodeName>,
    /// Nodes whose kernels answer and whose agents do not.
    pub silent: BTreeSet<NodeName>,
    /// Addresses that came in order, with the nodes that still have connections of theirs.
    pub before: BTreeMap<IpAddr, NodeName>,
    /// Link-layer addresses of the links in use.
    pub macs: BTreeMap<String, String>,
    pub malformed: Malformed,
    pub failures: Vec<String>,
}

impl Standing {
    fn published(&self) -> AnswersFor {
        let held = self.held.iter().take(PUBLISHED_AT_MOST).copied().collect();
        let contested = self.contested.iter().take(PUBLISHED_AT_MOST);
        AnswersFor { held, contested: contested.map(|(ip, mac)| (*ip, mac.clone())).collect() }
    }
}

/// Packets that were dropped because they are not well-formed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Malformed {
    pub arp: u64,
    pub neighbour_discovery: u64,
}

/// Hands plans to the announcer, and says what became of the last one.
pub struct AnnounceApplier {
    plans: watch::Sender<Option<Arc<Plan>>>,
    standing: watch::Receiver<Standing>,
}

/// The announcer's task, to be run, and its applier. `journal` remembers what settings of links held before; `answers_for` is where
/// the other nodes are told.
pub fn announcer(
    notices: Notices,
    journal: Journal,
    answers_for: watch::Sender<Option<AnswersFor>>,
) -> (AnnounceApplier, watch::Receiver<Standing>, watch::Receiver<Option<Arc<Plan>>>, Announcer) {
    let (plans, plan) = watch::channel(None);
    let (standing_tx, standing) = watch::channel(Standing::default());
    let announcer = Announcer { plan: plan.clone(), standing: standing_tx, answers_for, notices, journal };
    (AnnounceApplier { plans, standing: standing.clone() }, standing, plan, announcer)
}

impl Applier for AnnounceApplier {
    type Plan = Plan;

    fn apply(&mut self, plan: &Plan, _trust: Trust) -> impl Future<Output = Applied> + Send {
        self.plans.send_if_modified(|known| {
            let differs = known.as_deref() != Some(plan);
            if differs {
                *known = Some(Arc::new(plan.clone()));
            }
            differs
        });
        let standing = self.standing.borrow().clone();
        let mut applied = Applied { failed: standing.failures, ..Applied::default() };
        let held: Vec<String> = standing.held.iter().map(IpAddr::to_string).collect();
        if !plan.addresses.is_empty() {
            applied.details.push(("answers for".to_owned(), held.join(", ")));
        }
        for (ip, mac) in standing.contested {
            applied.details.push(("contested".to_owned(), format!("{ip}: {mac} answers for it")));
        }
        std::future::ready(applied)
    }
}

pub struct Announcer {
    plan: watch::Receiver<Option<Arc<Plan>>>,
    standing: watch::Sender<Standing>,
    answers_for: watch::Sender<Option<AnswersFor>>,
    notices: Notices,
    journal: Journal,
}

/// How far this node is with an address.
enum Phase {
    Asking {
        since: Instant,
        asked: u32,
        answered: Option<Mac>,
    },
    Held {
        told: usize,
        tell_at: Instant,
    },
    /// Another node is to have it: still answered for until he claims it.
    Yielding {
        since: Instant,
        claimed: bool,
    },
    Contested {
        until: Instant,
    },
}

impl Phase {
    /// `None`: in the next turn.
    fn due_at(&self) -> Option<Instant> {
        match self {
            Self::Held { tell_at, .. } => Some(*tell_at),
            Self::Contested { until } => Some(*until),
            Self::Asking { .. } | Self::Yielding { .. } => None,
        }
    }

    /// The kernel has entries for it.
    fn answers(&self) -> bool {
        matches!(self, Self::Held { .. } | Self::Yielding { .. })
    }
}

/// How well a peer answers.
struct Pulse {
    unanswered: u32,
    /// In a row, while it is dead.
    answered: u32,
    doubtful: bool,
    dead: bool,
    /// When its agent was heard of, or when it was first listened to.
    agent_heard: Instant,
}

impl Pulse {
    fn from_now() -> Self {
        Self { unanswered: 0, answered: 0, doubtful: false, dead: false, agent_heard: Instant::now() }
    }

    /// The time in which this agent did not run says nothing about the peer's.
    fn forgive(&mut self, slept: Duration) {
        self.agent_heard += slept;
    }

    fn is_silent(&self) -> bool {
        self.agent_heard.elapsed() > AGENT_SILENT
    }

    fn sent(&mut self) {
        self.unanswered += 1;
    }

    /// In the turn after an echo was sent.
    fn judge(&mut self) {
        self.doubtful = self.unanswered >= DOUBTFUL_AFTER;
        if self.unanswered >= DEAD_AFTER {
            (self.dead, self.answered) = (true, 0);
        }
    }

    fn replied(&mut self) {
        (self.unanswered, self.doubtful) = (0, false);
        self.answered += 1;
        if self.answered >= ALIVE_AFTER {
            self.dead = false;
        }
    }
}

/// Name and index.
type LinkId = (String, u32);

struct Work {
    netlink: Answering,
    echo4: Icmp4,
    icmp6: Icmp6,
    identifier: u16,
    pulses: BTreeMap<NodeName, Pulse>,
    links: BTreeMap<LinkId, Arp>,
    carriers: Carriers,
    phases: BTreeMap<IpAddr, Phase>,
    rules: AnswerRules,
    /// What the rules say now; `None` when they may say anything.
    ruled: Option<Answers>,
    /// Whose a link-layer address is.
    cards: BTreeMap<Mac, NodeName>,
    cards_asked: Option<Instant>,
    /// Of addresses that came in order: from whom, and when.
    before: BTreeMap<IpAddr, (NodeName, Instant)>,
    /// What `mine` was elected of.
    elected_of: Option<(Arc<Plan>, Alive)>,
    mine: BTreeSet<IpAddr>,
    /// Addresses to be asked for before it is sure that they are `mine`.
    next: BTreeSet<IpAddr>,
    had_quorum: bool,
    last_turn: Instant,
    /// Nothing is claimed from other nodes before.
    claim_at: Instant,
    /// When an address is to be looked at again, if nothing happens before.
    look_at: Instant,
    /// When the kernel's entries are to be looked at again.
    verify_at: Instant,
    standing: Standing,
    notices: Notices,
    node: NodeName,
}

impl Announcer {
    /// Runs as long as the agent.
    ///
    /// # Errors
    /// When the kernel gives no sockets.
    pub async fn run(mut self) -> Result<(), String> {
        let Some(first) = self.next_plan().await else { return Ok(()) };
        let work = Work::open(self.notices.clone(), first.node.clone(), self.journal.clone());
        let mut work = work.map_err(|error| format!("open a socket: {error}"))?;
        work.adopt(&first).await;
        let mut turns = tokio::time::interval(TURN);
        turns.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut published_at: Option<Instant> = None;
        let mut unpublished = true;
        for turn in 0u64.. {
            let plan = self.plan.borrow_and_update().clone();
            let Some(plan) = plan else { return Ok(()) };
            work.turn(&plan, turn).await;
            unpublished |= self.standing.send_if_modified(|known| {
                let differs = *known != work.standing;
                if differs {
                    known.clone_from(&work.standing);
                }
                differs
            });
            if unpublished && published_at.is_none_or(|at| at.elapsed() >= PUBLISHED_AGAIN) {
                self.answers_for.send_replace(Some(work.standing.published()));
                (published_at, unpublished) = (Some(Instant::now()), false);
            }
            if plan.addresses.is_empty() && work.phases.is_empty() && !unpublished {
                // Nobody is asked for nothing.
                work.pulses.clear();
                if self.plan.changed().await.is_err() {
                    return Ok(());
                }
            }
            turns.tick().await;
        }
        Ok(())
    }

    async fn next_plan(&mut self) -> Option<Arc<Plan>> {
        loop {
            if let Some(plan) = self.plan.borrow_and_update().clone() {
                return Some(plan);
            }
            self.plan.changed().await.ok()?;
        }
    }
}

impl Work {
    fn open(notices: Notices, node: NodeName, journal: Journal) -> std::io::Result<Self> {
        Ok(Self {
            netlink: Answering::connect(journal)?,
            echo4: Icmp4::open()?,
            icmp6: Icmp6::open()?,
            identifier: u16::try_from(std::process::id() & 0xffff).unwrap_or(1),
            pulses: BTreeMap::new(),
            links: BTreeMap::new(),
            carriers: Carriers::open()?,
            phases: BTreeMap::new(),
            rules: AnswerRules::default(),
            ruled: None,
            cards: BTreeMap::new(),
            cards_asked: None,
            before: BTreeMap::new(),
            elected_of: None,
            mine: BTreeSet::new(),
            next: BTreeSet::new(),
            had_quorum: true,
            last_turn: Instant::now(),
            claim_at: Instant::now() + STARTED,
            look_at: Instant::now(),
            verify_at: Instant::now() + TOLD_PERIODICALLY,
            standing: Standing::default(),
            notices,
            node,
        })
    }

    /// What the kernel answers for already is held, without a question; what no plan has is withdrawn in the first turn. What another
    /// node claimed meanwhile is his.
    async fn adopt(&mut self, plan: &Plan) {
        let yielded = self.rules.yielded().unwrap_or_else(|error| {
            self.failed(chain(&error));
            BTreeSet::new()
        });
        match self.netlink.observe().await {
            Ok(present) => {
                let now = Instant::now();
                let phase = |ip: &IpAddr| match yielded.contains(ip) {
                    true => Phase::Yielding { since: now, claimed: true },
                    false => Phase::Held { told: 0, tell_at: now },
                };
                self.phases = present.into_iter().map(|ip| (ip, phase(&ip))).collect();
            }
            Err(error) => self.failed(error),
        }
        tracing::debug!(adopted = self.phases.len(), planned = plan.addresses.len(), "announcer");
    }

    fn failed(&mut self, error: String) {
        if !self.standing.failures.contains(&error) {
            tracing::warn!(error, "announce addresses");
            self.standing.failures.push(error);
        }
    }

    async fn turn(&mut self, plan: &Arc<Plan>, turn: u64) {
        let plan_is_new = !self.elected_of.as_ref().is_some_and(|(known, _)| Arc::ptr_eq(known, plan));
        if plan_is_new {
            self.pulses.retain(|name, _| plan.peers.contains_key(name));
            self.cards.retain(|_, name| plan.peers.contains_key(name));
        }
        let slept = self.last_turn.elapsed();
        if slept > SLEPT {
            self.pulses.values_mut().for_each(|pulse| pulse.forgive(slept));
        }
        self.last_turn = Instant::now();
        if plan_is_new || turn.is_multiple_of(LINK_TURNS) {
            self.open_links(plan).await;
        }
        self.hear(plan);
        while let Some(index) = self.carriers.came_up() {
            self.tell_soon(plan, index);
        }
        if turn.is_multiple_of(ECHO_TURNS) {
            self.send_echoes(plan);
        } else {
            self.pulses.values_mut().for_each(Pulse::judge);
        }
        let alive = self.alive(plan);
        if plan_is_new || self.elected_of.as_ref().is_none_or(|(_, known)| *known != alive) {
            self.mine = elect(plan, &alive);
            self.next = next_in_line(plan, &alive);
            let has_quorum = has_quorum(plan, &alive.kernels);
            if has_quorum && !self.had_quorum {
                self.claim_at = Instant::now() + BACK;
            }
            self.had_quorum = has_quorum;
            self.elected_of = Some((plan.clone(), alive.clone()));
            self.look_at = Instant::now();
        }
        if Instant::now() < self.look_at {
            return;
        }
        self.verify(plan).await;
        let changed = self.let_go(plan, &alive).await | self.pursue_all(plan).await;
        self.before.retain(|ip, (node, since)| {
            self.mine.contains(ip) && alive.kernels.contains(node) && since.elapsed() < HANDOVER
        });
        if changed || plan_is_new || self.before.len() != self.standing.before.len() {
            self.settle(plan);
        }
        let now = Instant::now();
        let dues = self.phases.values().map(|phase| phase.due_at().unwrap_or(now));
        self.look_at = dues.min().unwrap_or(now).min(self.verify_at);
    }

    /// Puts back what others took away of the kernel's entries and rules.
    async fn verify(&mut self, plan: &Plan) {
        let now = Instant::now();
        if now < self.verify_at {
            return;
        }
        self.verify_at = now + TOLD_PERIODICALLY;
        self.ruled = None;
        match self.netlink.complete().await {
            Ok(complete) => {
                let held = self.phases.iter().filter(|(_, phase)| phase.answers()).map(|(ip, _)| *ip);
                let missing: Vec<IpAddr> = held.filter(|ip| !complete.contains(ip)).collect();
                for ip in missing {
                    if let Some(announced) = plan.addresses.get(&ip) {
                        self.ensure(ip, announced).await;
                    }
                }
            }
            Err(error) => self.failed(error),
        }
        self.settle(plan);
    }

    /// The peers as they are heard of.
    fn alive(&mut self, plan: &Plan) -> Alive {
        let mut alive = Alive::default();
        (self.standing.dead, self.standing.silent) = Default::default();
        for name in plan.peers.keys() {
            let pulse = self.pulses.get(name);
            if pulse.is_some_and(|pulse| pulse.dead) {
                self.standing.dead.insert(name.clone());
                continue;
            }
            alive.kernels.insert(name.clone());
            if pulse.is_some_and(Pulse::is_silent) {
                self.standing.silent.insert(name.clone());
            } else {
                alive.agents.insert(name.clone());
            }
            if pulse.is_some_and(|pulse| pulse.doubtful) {
                alive.doubtful.insert(name.clone());
            }
        }
        alive
    }

    /// It is asked for before it is this node's.
    fn is_asked_early(&self, ip: IpAddr) -> bool {
        self.next.contains(&ip) && matches!(self.phases.get(&ip), None | Some(Phase::Asking { .. }))
    }

    /// Addresses that this node is not to answer for: those that a living node is to have are answered for until he claims them.
    async fn let_go(&mut self, plan: &Plan, alive: &Alive) -> bool {
        let now = Instant::now();
        let of_others = |ip: &&IpAddr| !self.mine.contains(*ip) && !self.is_asked_early(**ip);
        let others: Vec<IpAddr> = self.phases.keys().filter(of_others).copied().collect();
        let mut changed = false;
        for ip in others {
            let succeeded = has_quorum(plan, &alive.kernels) && elected(plan, alive, ip).is_some();
            match self.phases.get(&ip) {
                Some(Phase::Held { .. }) if succeeded => {
                    self.phases.insert(ip, Phase::Yielding { since: now, claimed: false });
                }
                Some(Phase::Yielding { since, claimed: false }) if succeeded && now - *since < YIELD => {}
                _ => {
                    self.withdraw(ip).await;
                    changed = true;
                }
            }
        }
        changed
    }

    async fn pursue_all(&mut self, plan: &Plan) -> bool {
        let now = Instant::now();
        let due = |ip: &&IpAddr| self.phases.get(*ip).and_then(Phase::due_at).is_none_or(|at| now >= at);
        let early = self.next.iter().filter(|ip| self.is_asked_early(**ip));
        let due: Vec<IpAddr> = self.mine.iter().filter(due).chain(early).copied().collect();
        let mut claimed = Vec::new();
        for ip in due {
            if let Some(announced) = plan.addresses.get(&ip).filter(|it| !it.links.is_empty()) {
                let answered = self.phases.get(&ip).is_some_and(Phase::answers);
                self.pursue(ip, announced, plan).await;
                if !answered && self.phases.get(&ip).is_some_and(Phase::answers) {
                    claimed.push((ip, announced));
                }
            }
        }
        if !claimed.is_empty() {
            // The rules come before the claim: they forget what others claimed.
            self.settle(plan);
        }
        for (ip, announced) in &claimed {
            self.tell(*ip, announced);
            self.say_claimed(*ip, announced);
        }
        !claimed.is_empty()
    }

    /// Makes the rules and what people are told those of the phases.
    fn settle(&mut self, plan: &Plan) {
        let answering: Vec<IpAddr> =
            self.phases.iter().filter(|(_, phase)| phase.answers()).map(|(ip, _)| *ip).collect();
        let links =
            |ip: &IpAddr| plan.addresses.get(ip).map(|announced| names(&announced.links)).unwrap_or_default();
        let node_on_lan = |ip: IpAddr, node: &NodeName| {
            let peer = plan.peers.get(node)?;
            peer.lan.iter().copied().find(|lan| lan.is_ipv6() == ip.is_ipv6())
        };
        let before = self.before.iter().filter_map(|(ip, (node, _))| Some((*ip, node_on_lan(*ip, node)?)));
        let answers = Answers {
            held: answering.iter().map(|ip| (*ip, links(ip))).collect(),
            own: self.links.values().map(|arp| arp.mac).collect(),
            before: before.collect(),
        };
        if self.ruled.as_ref() != Some(&answers) {
            match self.rules.apply(&answers) {
                Ok(()) => self.ruled = Some(answers),
                Err(error) => {
                    self.ruled = None;
                    self.failed(chain(&error));
                }
            }
        }
        self.standing.macs =
            self.links.iter().map(|((name, _), arp)| (name.clone(), text(arp.mac))).collect();
        self.standing.held = answering.into_iter().collect();
        self.standing.before = self.before.iter().map(|(ip, (node, _))| (*ip, node.clone())).collect();
    }

    /// A link came up: whoever is on it may never have heard of what is answered for there, or has forgotten.
    fn tell_soon(&mut self, plan: &Plan, index: u32) {
        let on_link = |ip: &IpAddr| {
            plan.addresses.get(ip).is_some_and(|announced| announced.links.values().any(|on| *on == index))
        };
        let now = Instant::now();
        for (_, phase) in self.phases.iter_mut().filter(|(ip, _)| on_link(ip)) {
            if let Phase::Held { told, tell_at } = phase {
                (*told, *tell_at) = (0, now);
                self.look_at = now;
            }
        }
    }

    /// One ARP socket for each link in use; a link that went and came has another index, and so a new socket.
    async fn open_links(&mut self, plan: &Plan) {
        let links = plan.addresses.values().flat_map(|announced| &announced.links);
        let wanted: BTreeSet<LinkId> = links.map(|(name, index)| (name.clone(), *index)).collect();
        self.links.retain(|link, _| wanted.contains(link));
        let missing: Vec<LinkId> = wanted.into_iter().filter(|link| !self.links.contains_key(link)).collect();
        for (name, index) in missing {
            let mac = self.netlink.mac(&name).await;
            let opened = mac.and_then(|mac| {
                Arp::open(index, mac).map_err(|error| format!("listen to ARP on {name}: {error}"))
            });
            match opened {
                Ok(arp) => {
                    self.links.insert((name, index), arp);
                    // The kernel may have seen claims that nobody heard here.
                    self.ruled = None;
                    self.tell_soon(plan, index);
                }
                Err(error) => self.failed(error),
            }
        }
    }

    fn send_echoes(&mut self, plan: &Plan) {
        for (name, peer) in &plan.peers {
            let sent = match peer.overlay {
                IpAddr::V4(ip) => self.echo4.echo(ip, self.identifier),
                IpAddr::V6(ip) => self.icmp6.echo(ip, self.identifier),
            };
            if let Err(error) = sent {
                tracing::trace!(%error, node = %name, "echo");
            }
            self.pulses.entry(name.clone()).or_insert_with(Pulse::from_now).sent();
        }
    }

    /// All that waits: echoes, and what others say of addresses that this node holds or asks for.
    fn hear(&mut self, plan: &Plan) {
        while let Ok(Some(heard)) = self.echo4.next() {
            self.take(plan, heard);
        }
        while let Ok(Some(heard)) = self.icmp6.next() {
            self.take(plan, heard);
        }
        let own: BTreeSet<Mac> = self.links.values().map(|arp| arp.mac).collect();
        let mut said = Vec::new();
        for arp in self.links.values() {
            while let Ok(Some(one)) = arp.next(&mut self.standing.malformed.arp) {
                said.push(one);
            }
        }
        for one in said.into_iter().filter(|one| !own.contains(&one.mac)) {
            self.answered(plan, one.ip.into(), one.mac);
        }
    }

    fn take(&mut self, plan: &Plan, heard: Heard) {
        match heard {
            Heard::Echo { from, identifier } if identifier == self.identifier => {
                if let Some(pulse) = self.pulse_of(plan, from) {
                    pulse.replied();
                }
            }
            Heard::Request { from } => {
                if let Some(pulse) = self.pulse_of(plan, from) {
                    pulse.agent_heard = Instant::now();
                }
            }
            Heard::Advertisement { ip, mac } if self.links.values().all(|arp| arp.mac != mac) => {
                self.answered(plan, ip.into(), mac);
            }
            Heard::Malformed => self.standing.malformed.neighbour_discovery += 1,
            _ => {}
        }
    }

    fn pulse_of(&mut self, plan: &Plan, from: IpAddr) -> Option<&mut Pulse> {
        let (name, _) = plan.peers.iter().find(|(_, peer)| peer.overlay == from)?;
        self.pulses.get_mut(name)
    }

    /// Another machine says that it has an address.
    fn answered(&mut self, plan: &Plan, ip: IpAddr, mac: Mac) {
        if let Some((node, _)) = plan.peers.iter().find(|(_, peer)| peer.lan.contains(&ip)) {
            self.cards.insert(mac, node.clone());
        }
        match self.phases.get_mut(&ip) {
            Some(Phase::Asking { answered, .. }) => *answered = Some(mac),
            Some(Phase::Yielding { claimed, .. }) => *claimed = true,
            // RFC 5227 2.4: defended by telling again, with rules that have forgotten the claim.
            Some(Phase::Held { tell_at, .. }) => {
                *tell_at = (*tell_at).min(Instant::now() + TOLD_AGAIN[1]);
                self.ruled = None;
                self.look_at = self.look_at.min(*tell_at);
            }
            _ => {}
        }
    }

    /// Asks for the link-layer addresses of the peers, so that a predecessor is known from a stranger.
    fn ask_for_cards(&mut self, ip: IpAddr, announced: &Announced, plan: &Plan) {
        if self.cards_asked.is_some_and(|asked| asked.elapsed() < CARDS_ASKED) {
            return;
        }
        self.cards_asked = Some(Instant::now());
        let known: BTreeSet<&NodeName> = self.cards.values().collect();
        let unknown = plan.peers.iter().filter(|(name, _)| !known.contains(name));
        for lan in unknown.flat_map(|(_, peer)| &peer.lan).filter(|lan| lan.is_ipv6() == ip.is_ipv6()) {
            self.ask(*lan, announced);
        }
    }

    async fn pursue(&mut self, ip: IpAddr, announced: &Announced, plan: &Plan) {
        let now = Instant::now();
        let phase = self.phases.remove(&ip).unwrap_or(Phase::Asking { since: now, asked: 0, answered: None });
        let may_claim = self.mine.contains(&ip) && (now >= self.claim_at || plan.peers.is_empty());
        let next = match phase {
            // Who is in doubt lives.
            Phase::Asking { answered: Some(_), .. } if !self.mine.contains(&ip) => {
                Phase::Asking { since: now, asked: 0, answered: None }
            }
            Phase::Asking { answered: Some(mac), .. } if self.cards.contains_key(&mac) && !may_claim => phase,
            Phase::Asking { answered: Some(mac), .. } if self.cards.contains_key(&mac) => {
                // A node of this cluster that goes silent as soon as it hears the claim.
                let node = self.cards[&mac].clone();
                self.before.insert(ip, (node, now));
                self.claim(ip, announced).await
            }
            Phase::Asking { since, answered: Some(mac), .. } if now - since > CONTESTED => {
                self.contest(ip, mac, announced);
                Phase::Contested { until: now + LATER }
            }
            Phase::Asking { since, asked, answered } => {
                // An answer begins the count anew: who is about to withdraw is waited for.
                let asked = if answered.is_some() { 0 } else { asked };
                if asked < QUESTIONS {
                    self.ask_for_cards(ip, announced, plan);
                    self.ask(ip, announced);
                    Phase::Asking { since, asked: asked + 1, answered: None }
                } else if !may_claim {
                    phase
                } else {
                    self.claim(ip, announced).await
                }
            }
            Phase::Held { told, tell_at } if now >= tell_at => {
                if self.ruled.is_none() {
                    self.phases.insert(ip, Phase::Held { told, tell_at });
                    self.settle(plan);
                }
                self.tell(ip, announced);
                let gap = TOLD_AGAIN.get(told).copied().unwrap_or(TOLD_PERIODICALLY);
                Phase::Held { told: told + 1, tell_at: now + gap }
            }
            // It came back before anybody claimed it.
            Phase::Yielding { claimed: false, .. } => Phase::Held { told: 0, tell_at: now },
            Phase::Yielding { claimed: true, .. } => {
                self.phases.insert(ip, phase);
                self.withdraw(ip).await;
                Phase::Asking { since: now, asked: 0, answered: None }
            }
            Phase::Contested { until } if now >= until => {
                Phase::Asking { since: now, asked: 0, answered: None }
            }
            other => other,
        };
        self.phases.insert(ip, next);
    }

    /// The kernel answers from now on; the LAN is told when all that is claimed in this turn is ruled.
    async fn claim(&mut self, ip: IpAddr, announced: &Announced) -> Phase {
        self.standing.contested.remove(&ip);
        self.ensure(ip, announced).await;
        Phase::Held { told: 0, tell_at: Instant::now() + TOLD_AGAIN[0] }
    }

    fn say_claimed(&self, ip: IpAddr, announced: &Announced) {
        tracing::info!(%ip, "this node answers for the address");
        for service in &announced.services {
            let message = format!("announcing {ip} from node {} with protocol \"layer2\"", self.node);
            let object = ObjectRef::new("Service", &service.namespace, &service.name);
            self.notices.say(Notice::new(object, Severity::Normal, "nodeAssigned", message));
        }
    }

    async fn ensure(&mut self, ip: IpAddr, announced: &Announced) {
        match self.netlink.ensure(ip, &names(&announced.links)).await {
            Ok(()) => self.standing.failures.clear(),
            Err(error) => self.failed(error),
        }
    }

    fn contest(&mut self, ip: IpAddr, mac: Mac, announced: &Announced) {
        let mac = text(mac);
        tracing::warn!(%ip, mac, "another machine answers for the address");
        for service in &announced.services {
            let object = ObjectRef::new("Service", &service.namespace, &service.name);
            let message = format!(
                "status.loadBalancer.ingress {ip} is answered for by the machine with MAC {mac}, so no node claims it; \
                 take the address from that machine, or out of the IPAddressPool"
            );
            self.notices.say(Notice::new(object, Severity::Warning, "Conflict", message));
        }
        self.standing.contested.insert(ip, mac);
    }

    async fn withdraw(&mut self, ip: IpAddr) {
        let phase = self.phases.remove(&ip);
        self.standing.contested.remove(&ip);
        if phase.is_some_and(|phase| phase.answers()) {
            match self.netlink.remove(ip).await {
                Ok(_) => tracing::info!(%ip, "this node no longer answers for the address"),
                Err(error) => {
                    self.failed(error);
                    // Tried again in the next turn.
                    self.phases.insert(ip, Phase::Held { told: 0, tell_at: Instant::now() });
                }
            }
        }
    }

    fn ask(&self, ip: IpAddr, announced: &Announced) {
        self.on_links(ip, announced, |arp, icmp6, index| match ip {
            IpAddr::V4(ip) => arp.ask(ip),
            IpAddr::V6(ip) => icmp6.ask(index, ip, arp.mac),
        });
    }

    fn tell(&self, ip: IpAddr, announced: &Announced) {
        self.on_links(ip, announced, |arp, icmp6, index| match ip {
            IpAddr::V4(ip) => arp.tell(ip),
            IpAddr::V6(ip) => icmp6.tell(index, ip, arp.mac),
        });
    }

    /// A link that takes no packet now is told again with the next claim or period.
    fn on_links(
        &self,
        ip: IpAddr,
        announced: &Announced,
        send: impl Fn(&Arp, &Icmp6, u32) -> std::io::Result<()>,
    ) {
        for (name, index) in &announced.links {
            let link = self.links.get(&(name.clone(), *index));
            if let Some(Err(error)) = link.map(|arp| send(arp, &self.icmp6, *index)) {
                tracing::debug!(%ip, link = name, error = chain(&error), "ask or tell the LAN");
            }
        }
    }
}

fn text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
