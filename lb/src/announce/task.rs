//! The announcer: the owner of the kernel entries by which this node answers, and the only place here that knows time.
//!
//! ```text
//!  every 50 ms: hear who lives, hear the LAN -> elect -> for each address: ask three times -> claim and tell -> tell again
//! ```
//!
//! A peer that left five echoes in a row unanswered (half a second) is dead, and lives again when it answered for a second. The
//! kernels answer the echoes, so an agent that restarts moves nothing; what its kernel answers for when it starts, it keeps.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use weft_model::{NodeName, Notice, ObjectRef, Severity};
use weft_netstack::kernel::lan::{Arp, Heard, Icmp4, Icmp6, Mac};
use weft_netstack::kernel::sysctl::Journal;
use weft_netstack::kernel::vip::Answering;
use weft_netstack::kube::Notices;
use weft_netstack::reconcile::{Applied, Applier, Trust, chain};

use super::{Announced, Plan, elect, names};

/// One turn.
const TURN: Duration = Duration::from_millis(50);
/// Between two echoes to a peer.
const ECHO_TURNS: u64 = 2;
/// Echoes without an answer after which a peer is dead, and answers after which it lives again.
const DEAD_AFTER: u32 = 5;
const ALIVE_AFTER: u32 = 10;
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

/// What the announcer does, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    pub held: BTreeSet<IpAddr>,
    /// Addresses that somebody else answers for, with his link-layer address.
    pub contested: BTreeMap<IpAddr, String>,
    pub dead: BTreeSet<NodeName>,
    /// Link-layer addresses of the links in use.
    pub macs: BTreeMap<String, String>,
    pub malformed: u64,
    pub failures: Vec<String>,
}

/// Hands plans to the announcer, and says what became of the last one.
pub struct AnnounceApplier {
    plans: watch::Sender<Option<Arc<Plan>>>,
    standing: watch::Receiver<Standing>,
}

/// The announcer's task, to be run, and its applier. `journal` remembers what settings of links held before.
pub fn announcer(
    notices: Notices,
    journal: Journal,
) -> (AnnounceApplier, watch::Receiver<Standing>, watch::Receiver<Option<Arc<Plan>>>, Announcer) {
    let (plans, plan) = watch::channel(None);
    let (standing_tx, standing) = watch::channel(Standing::default());
    let announcer = Announcer { plan: plan.clone(), standing: standing_tx, notices, journal };
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
    notices: Notices,
    journal: Journal,
}

/// How far this node is with an address.
enum Phase {
    Asking { since: Instant, asked: u32, answered: Option<Mac> },
    Held { told: usize, tell_at: Instant },
    Contested { until: Instant },
}

/// How well a peer answers.
#[derive(Default)]
struct Pulse {
    unanswered: u32,
    /// In a row, while it is dead.
    answered: u32,
    dead: bool,
}

impl Pulse {
    fn sent(&mut self) {
        self.unanswered += 1;
        if self.unanswered > DEAD_AFTER {
            (self.dead, self.answered) = (true, 0);
        }
    }

    fn replied(&mut self) {
        self.unanswered = 0;
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
    phases: BTreeMap<IpAddr, Phase>,
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
        for turn in 0u64.. {
            let plan = self.plan.borrow_and_update().clone();
            let Some(plan) = plan else { return Ok(()) };
            work.turn(&plan, turn).await;
            self.standing.send_if_modified(|known| {
                let differs = *known != work.standing;
                *known = work.standing.clone();
                differs
            });
            if plan.addresses.is_empty() && work.phases.is_empty() {
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
            phases: BTreeMap::new(),
            standing: Standing::default(),
            notices,
            node,
        })
    }

    /// What the kernel answers for already is held, without a question; what no plan has is withdrawn in the first turn.
    async fn adopt(&mut self, plan: &Plan) {
        match self.netlink.observe().await {
            Ok(present) => {
                let held = || Phase::Held { told: 0, tell_at: Instant::now() };
                self.phases = present.into_iter().map(|ip| (ip, held())).collect();
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

    async fn turn(&mut self, plan: &Plan, turn: u64) {
        self.open_links(plan).await;
        self.hear(plan);
        self.pulses.retain(|name, _| plan.peers.contains_key(name));
        if turn.is_multiple_of(ECHO_TURNS) {
            self.send_echoes(plan);
        }
        let lives = |name: &&NodeName| !self.pulses.get(*name).is_some_and(|pulse| pulse.dead);
        let alive: BTreeSet<NodeName> = plan.peers.keys().filter(lives).cloned().collect();
        self.standing.dead = plan.peers.keys().filter(|name| !alive.contains(*name)).cloned().collect();
        let mine = elect(plan, &alive);
        let lost: Vec<IpAddr> = self.phases.keys().filter(|ip| !mine.contains(*ip)).copied().collect();
        for ip in lost {
            self.withdraw(ip).await;
        }
        for ip in mine {
            if let Some(announced) = plan.addresses.get(&ip).filter(|it| !it.links.is_empty()) {
                self.pursue(ip, announced).await;
            }
        }
        let macs = self.links.iter().map(|((name, _), arp)| (name.clone(), text(arp.mac)));
        self.standing.macs = macs.collect();
        let held = self.phases.iter().filter(|(_, phase)| matches!(phase, Phase::Held { .. }));
        self.standing.held = held.map(|(ip, _)| *ip).collect();
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
                Ok(arp) => drop(self.links.insert((name, index), arp)),
                Err(error) => self.failed(error),
            }
        }
    }

    fn send_echoes(&mut self, plan: &Plan) {
        for (name, ip) in &plan.peers {
            let sent = match ip {
                IpAddr::V4(ip) => self.echo4.echo(*ip, self.identifier),
                IpAddr::V6(ip) => self.icmp6.echo(*ip, self.identifier),
            };
            if let Err(error) = sent {
                tracing::trace!(%error, node = %name, "echo");
            }
            self.pulses.entry(name.clone()).or_default().sent();
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
            while let Ok(Some(one)) = arp.next(&mut self.standing.malformed) {
                said.push(one);
            }
        }
        for one in said.into_iter().filter(|one| !own.contains(&one.mac)) {
            self.answered(one.ip.into(), one.mac);
        }
    }

    fn take(&mut self, plan: &Plan, heard: Heard) {
        match heard {
            Heard::Echo { from, identifier } if identifier == self.identifier => {
                let peer = plan.peers.iter().find(|(_, ip)| **ip == from).map(|(name, _)| name);
                if let Some(pulse) = peer.and_then(|name| self.pulses.get_mut(name)) {
                    pulse.replied();
                }
            }
            Heard::Advertisement { ip, mac } if self.links.values().all(|arp| arp.mac != mac) => {
                self.answered(ip.into(), mac);
            }
            _ => {}
        }
    }

    /// Another machine says that it has an address.
    fn answered(&mut self, ip: IpAddr, mac: Mac) {
        match self.phases.get_mut(&ip) {
            Some(Phase::Asking { answered, .. }) => *answered = Some(mac),
            // RFC 5227 2.4: defended by telling again.
            Some(Phase::Held { tell_at, .. }) => *tell_at = (*tell_at).min(Instant::now() + TOLD_AGAIN[1]),
            _ => {}
        }
    }

    async fn pursue(&mut self, ip: IpAddr, announced: &Announced) {
        let now = Instant::now();
        let phase = self.phases.remove(&ip).unwrap_or(Phase::Asking { since: now, asked: 0, answered: None });
        let next = match phase {
            Phase::Asking { since, answered: Some(mac), .. } if now - since > CONTESTED => {
                self.contest(ip, mac, announced);
                Phase::Contested { until: now + LATER }
            }
            Phase::Asking { since, asked, answered } => {
                // An answer begins the count anew: who is about to withdraw is waited for.
                let asked = if answered.is_some() { 0 } else { asked };
                if asked < QUESTIONS {
                    self.ask(ip, announced);
                    Phase::Asking { since, asked: asked + 1, answered: None }
                } else {
                    self.claim(ip, announced).await
                }
            }
            Phase::Held { told, tell_at } if now >= tell_at => {
                self.ensure(ip, announced).await;
                self.tell(ip, announced);
                let gap = TOLD_AGAIN.get(told).copied().unwrap_or(TOLD_PERIODICALLY);
                Phase::Held { told: told + 1, tell_at: now + gap }
            }
            Phase::Contested { until } if now >= until => {
                Phase::Asking { since: now, asked: 0, answered: None }
            }
            other => other,
        };
        self.phases.insert(ip, next);
    }

    async fn claim(&mut self, ip: IpAddr, announced: &Announced) -> Phase {
        self.standing.contested.remove(&ip);
        self.ensure(ip, announced).await;
        self.tell(ip, announced);
        tracing::info!(%ip, "this node answers for the address");
        for service in &announced.services {
            let message = format!("announcing {ip} from node {} with protocol \"layer2\"", self.node);
            let object = ObjectRef::new("Service", &service.namespace, &service.name);
            self.notices.say(Notice::new(object, Severity::Normal, "nodeAssigned", message));
        }
        Phase::Held { told: 0, tell_at: Instant::now() + TOLD_AGAIN[0] }
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
        if matches!(phase, Some(Phase::Held { .. })) {
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

    fn ask(&mut self, ip: IpAddr, announced: &Announced) {
        self.on_links(ip, announced, |arp, icmp6, index| match ip {
            IpAddr::V4(ip) => arp.ask(ip),
            IpAddr::V6(ip) => icmp6.ask(index, ip, arp.mac),
        });
    }

    fn tell(&mut self, ip: IpAddr, announced: &Announced) {
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
