//! One UDP socket and the thread that serves it: whole batches in and out, nothing else on its way.
//!
//! ```text
//!  recvmmsg -> each: fast::answer under one read lock, or a kept answer of an upstream -> sendmmsg
//!                    what it leaves -> a task of its own on the runtime: Resolver::exchange -> sendto
//! ```
//!
//! A blocking thread, because a runtime's other work would delay it. The tasks are bounded, in all and for each client:
//! beyond that a datagram is dropped, never waited for. So is that of a client that asks too often. What was asked while no agent
//! ran would be too much for these bounds: it stays in the socket until the names are there. Between batches the thread gives signs
//! of life (`heart`).

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hickory_server::net::xfer::Protocol;
use nix::sys::socket::{MsgFlags, SockaddrStorage, sendto};
use tokio::runtime::Handle;
use tokio::task::JoinSet;
use weft_netstack::kernel::datagram::{Batch, Datagram};
use weft_netstack::kernel::stop::Stop;

use crate::custom::Custom;
use crate::fast::Asked;
use crate::log::Heard;
use crate::quota::Quota;
use crate::serve::{Resolver, came, undeserving};
use crate::stats::{Dropped, Tally};
use crate::store::Reading;

use super::heart::{Heart, Pulse};

/// A thread without datagrams that gives no signs of life looks around this often.
const REST: Duration = Duration::from_secs(60);
/// How long a kept socket is left alone for names to come. Not longer: where there is no last good Snapshot, names outside the
/// cluster would wait for nothing.
const LEFT_ALONE: Duration = Duration::from_secs(1);
/// How often it is asked whether they came.
const NAMES_LOOK: Duration = Duration::from_millis(1);
/// Pause after a failed receive, so that a broken socket costs no whole core.
const RECEIVE_PAUSE: Duration = Duration::from_millis(10);
/// Questions of one socket that wait for an answer that is not at hand.
const MAX_WAITING: usize = 2048;
/// Of one client.
const MAX_WAITING_PER_CLIENT: usize = 256;

/// What a socket sees first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum First {
    /// It is new: nothing waits in it.
    Questions,
    /// It was kept from the agent before, which also left names.
    Names,
}

/// A socket that is answered until this is dropped.
pub(super) struct Server {
    stop: Arc<Stop>,
    thread: JoinHandle<()>,
    pulse: Option<Pulse>,
}

impl Server {
    /// Needs a tokio runtime, for what takes longer. Gives signs of life if it has a heart.
    pub(super) fn start(
        socket: UdpSocket,
        resolver: Arc<Resolver>,
        first: First,
        heart: Option<Heart>,
    ) -> io::Result<Self> {
        socket.set_nonblocking(false)?;
        let stop = Arc::new(Stop::new()?);
        let pulse = heart.as_ref().map(Heart::pulse);
        let mut serving = Serving {
            socket: Arc::new(socket),
            resolver,
            runtime: Handle::current(),
            quota: Quota::new(MAX_WAITING_PER_CLIENT),
            waiting: JoinSet::new(),
            heart,
        };
        let told = stop.clone();
        let thread = std::thread::Builder::new().name("dns-udp".to_owned()).spawn(move || {
            let mut batch = Batch::default();
            if first == First::Names {
                serving.await_names(&told);
            }
            while !told.is_asked() {
                let patience = serving.beat();
                serving.turn(&mut batch, patience, &told);
            }
        })?;
        Ok(Self { stop, thread, pulse })
    }

    /// How long ago the last sign of life was, if there was one.
    pub(super) fn silent_for(&self) -> Option<Duration> {
        self.pulse.as_ref().and_then(Pulse::age)
    }

    pub(super) fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }
}

impl Drop for Server {
    /// The thread closes the socket after its batch.
    fn drop(&mut self) {
        self.stop.ask();
    }
}

struct Serving {
    socket: Arc<UdpSocket>,
    resolver: Arc<Resolver>,
    runtime: Handle,
    quota: Quota,
    waiting: JoinSet<()>,
    heart: Option<Heart>,
}

impl Serving {
    fn await_names(&self, stop: &Stop) {
        let since = Instant::now();
        let store = self.resolver.store();
        while !store.is_ready() && !stop.is_asked() && since.elapsed() < LEFT_ALONE {
            std::thread::sleep(NAMES_LOOK);
        }
    }

    /// Returns how long until the next.
    fn beat(&mut self) -> Duration {
        let Some(heart) = &mut self.heart else { return REST };
        let has_names = || self.resolver.store().is_ready();
        heart.beat(&self.socket, has_names, &self.runtime, Instant::now())
    }

    /// Waits for one batch and answers it.
    fn turn(&mut self, batch: &mut Batch, patience: Duration, stop: &Stop) {
        match batch.receive(&self.socket, patience, stop) {
            Ok(0) => {}
            Ok(_) => self.answer(batch),
            Err(error) if is_about_a_reply(&error) => {}
            Err(error) => {
                tracing::debug!(%error, "DNS datagrams not received");
                std::thread::sleep(RECEIVE_PAUSE);
            }
        }
    }

    fn answer(&mut self, batch: &mut Batch) {
        let now = Instant::now();
        let mut left = Vec::new();
        let (mut came, mut answered) = (0, 0);
        {
            let custom = self.resolver.custom();
            let reading = self.resolver.store().read();
            let mut tally = Tally::of(self.resolver.stats());
            for datagram in batch.datagrams() {
                if self.heart.as_ref().is_some_and(|heart| heart.is_own(datagram.from, datagram.bytes)) {
                    continue;
                }
                came += 1;
                if let Some(client) = datagram.from
                    && !self.resolver.rate().admits(client.ip(), now)
                {
                    self.resolver.stats().count_dropped(Dropped::Rate);
                    let heard = Heard::Nothing(Dropped::Rate);
                    self.resolver.log().note(client, Protocol::Udp, datagram.bytes, heard, now);
                    continue;
                }
                match answer_one(&self.resolver, &custom, &reading, &mut tally, now, datagram) {
                    Became::Answered => answered += 1,
                    Became::Nothing => {}
                    Became::Left(bytes, client) => left.push((bytes, client)),
                }
            }
        }
        self.resolver.stats().count_requests(Protocol::Udp, came);
        let unsent = batch.send_replies(&self.socket);
        self.resolver.stats().count_many_dropped(Dropped::Unsent, unsent);
        self.resolver.stats().count_duration(now.elapsed(), answered);
        left.into_iter().for_each(|(bytes, client)| self.defer(bytes, client, now));
    }

    /// Answers in a task of its own, if there is a place.
    fn defer(&mut self, bytes: Vec<u8>, client: SocketAddr, came_at: Instant) {
        while self.waiting.try_join_next().is_some() {}
        let share = self.quota.take(client.ip()).filter(|_| self.waiting.len() < MAX_WAITING);
        let Some(share) = share else {
            self.resolver.stats().count_dropped(Dropped::Busy);
            let heard = Heard::Nothing(Dropped::Busy);
            self.resolver.log().note(client, Protocol::Udp, &bytes, heard, came_at);
            return;
        };
        let (resolver, socket) = (self.resolver.clone(), self.socket.clone());
        let work = async move {
            let _held = share;
            let question = resolver.log().is_looked_at().then(|| bytes.clone());
            if let Some(reply) = resolver.exchange(bytes, client, Protocol::Udp).await {
                let to = SockaddrStorage::from(client);
                if let Err(error) = sendto(socket.as_raw_fd(), &reply, &to, MsgFlags::MSG_DONTWAIT) {
                    tracing::debug!(%client, %error, "answer not sent");
                    resolver.stats().count_dropped(Dropped::Unsent);
                }
                if let Some(question) = question {
                    resolver.log().note(client, Protocol::Udp, &question, Heard::Answer(&reply), came_at);
                }
                resolver.stats().count_sent(Protocol::Udp, reply.len(), 1);
                resolver.stats().count_duration(came_at.elapsed(), 1);
            }
        };
        self.waiting.spawn_on(work, &self.runtime);
    }
}

/// What became of a datagram on the thread.
enum Became {
    Answered,
    /// It deserves no answer.
    Nothing,
    /// A copy, for a task of its own.
    Left(Vec<u8>, SocketAddr),
}

/// Answers into the datagram's reply what is asked all the time.
fn answer_one(
    resolver: &Resolver,
    custom: &Custom,
    reading: &Reading<'_>,
    tally: &mut Tally<'_>,
    now: Instant,
    datagram: Datagram<'_>,
) -> Became {
    let Some(client) = datagram.from else { return Became::Nothing };
    if let Some(reason) = undeserving(datagram.bytes, client) {
        resolver.stats().count_dropped(reason);
        return Became::Nothing;
    }
    let asked = if datagram.cut { None } else { Asked::read(datagram.bytes) };
    tally.came(came(datagram.bytes, asked.as_ref(), client, Protocol::Udp));
    let code = asked.and_then(|asked| resolver.at_hand(&asked, custom, reading, now, datagram.reply));
    let Some(code) = code else { return Became::Left(datagram.bytes.to_vec(), client) };
    tally.answered(code, datagram.reply.len());
    resolver.log().note(client, Protocol::Udp, datagram.bytes, Heard::Answer(datagram.reply), now);
    Became::Answered
}

/// The network said that an earlier reply did not arrive: the client is gone.
fn is_about_a_reply(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, HostUnreachable, NetworkUnreachable};
    matches!(error.kind(), ConnectionRefused | HostUnreachable | NetworkUnreachable)
}
