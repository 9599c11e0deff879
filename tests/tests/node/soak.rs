//! Questions by the thousand while the API server is away and the host's resolvers die, lie and delay: no answer is wrong, names of the
//! cluster are always answered, and other names as long as one resolver of the host is usable. Half a minute;
//! WEFT_SOAK_SECONDS=600 makes it ten.

mod upstream;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hickory_proto::op::{Edns, Message, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use weft_tests::node::{DNS, Node, dig, inside, ip, until, write};

use crate::objects::make_service;
use upstream::{Manner, Upstream, ZONE, truth};

const UPSTREAMS: [&str; 2] = ["172.31.0.53", "fd00:31::53"];
const CLIENTS: u64 = 4;
/// Between two questions of one client.
const PACE: Duration = Duration::from_millis(8);
const STEP: Duration = Duration::from_secs(2);
/// As glibc's.
const PATIENCE: Duration = Duration::from_secs(5);
/// What could not be found out is not asked again before (docs/dns.md); a little more.
const FAILURE_KEPT: Duration = Duration::from_millis(5200);
/// Names outside the cluster, so few that many are in the cache and so many that many are not.
const NAMES: u16 = 2000;

/// Until when a failure is no fault: no upstream was usable just before.
struct Excuse(Mutex<Option<Instant>>);

impl Excuse {
    /// From now on, until [`Self::ends`].
    fn begins(&self) {
        *self.0.lock().unwrap() = Some(Instant::now() + Duration::from_secs(3600));
    }

    fn ends(&self) {
        *self.0.lock().unwrap() = Some(Instant::now() + FAILURE_KEPT);
    }

    /// Of a question that was asked then and failed by now.
    fn holds(&self, asked: Instant) -> bool {
        self.0.lock().unwrap().is_some_and(|until| asked < until)
    }
}

/// What became of the questions.
#[derive(Default)]
struct Tally {
    asked: AtomicU64,
    right: AtomicU64,
    /// SERVFAIL, or none, while no upstream was usable.
    excused: AtomicU64,
    /// The same though one was.
    owed: AtomicU64,
    longest_cluster_micros: AtomicU64,
}

fn count(counter: &AtomicU64) -> u64 {
    counter.fetch_add(1, Ordering::Relaxed) + 1
}

/// A question and the answers that are right.
struct Case {
    name: Name,
    kind: RecordType,
    of_cluster: bool,
    code: ResponseCode,
    records: Vec<String>,
}

/// Without times to live, which a cache shortens, and letters' case.
fn texts<'a>(records: impl IntoIterator<Item = &'a hickory_proto::rr::Record>) -> Vec<String> {
    let mut texts: Vec<String> =
        records.into_iter().map(|record| format!("{} {}", record.name, record.data).to_lowercase()).collect();
    texts.sort();
    texts
}

fn case(rng: &mut StdRng, vips: &[String]) -> Case {
    let cluster = |name: &str, kind, code, records: Vec<String>| Case {
        name: name.parse().unwrap(),
        kind,
        of_cluster: true,
        code,
        records,
    };
    let web = "web.default.svc.cluster.local.";
    match rng.random_range(0..10) {
        0 => cluster(web, RecordType::A, ResponseCode::NoError, vec![format!("{web} {}", vips[0])]),
        1 => cluster(web, RecordType::AAAA, ResponseCode::NoError, vec![format!("{web} {}", vips[1])]),
        2 => cluster("none.default.svc.cluster.local.", RecordType::A, ResponseCode::NXDomain, vec![]),
        _ => {
            let letter = ["a", "a", "a", "v", "v", "c", "n", "t"].choose(rng).unwrap();
            let name: Name = format!("{letter}{}.{ZONE}", rng.random_range(0..NAMES)).parse().unwrap();
            let kind = match *letter {
                "t" => RecordType::TXT,
                _ if rng.random() => RecordType::A,
                _ => RecordType::AAAA,
            };
            let (code, records) = truth(&name, kind);
            Case { records: texts(&records), name, kind, of_cluster: false, code }
        }
    }
}

fn by_udp(server: SocketAddr, question: &[u8]) -> std::io::Result<Vec<u8>> {
    let socket = UdpSocket::bind(if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(server)?;
    socket.send(question)?;
    let mut buffer = vec![0; 4096];
    let length = socket.recv(&mut buffer)?;
    buffer.truncate(length);
    Ok(buffer)
}

fn by_tcp(server: SocketAddr, question: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&server, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let length = u16::try_from(question.len()).unwrap().to_be_bytes();
    stream.write_all(&[&length[..], question].concat())?;
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut answer)?;
    Ok(answer)
}

/// The answer; by TCP where that by UDP is cut.
fn ask(server: SocketAddr, case: &Case, rng: &mut StdRng) -> Option<Message> {
    let mut question = Message::query();
    question.metadata.recursion_desired = true;
    question.add_query(Query::query(case.name.clone(), case.kind));
    if rng.random() {
        let mut edns = Edns::new();
        edns.set_max_payload(1232);
        question.set_edns(edns);
    }
    let id = question.metadata.id;
    let question = question.to_vec().unwrap();
    let by_tcp_at_once = rng.random_range(0..10) == 0;
    let first = if by_tcp_at_once { by_tcp(server, &question) } else { by_udp(server, &question) };
    let read = |bytes: Vec<u8>| Message::from_vec(&bytes).expect("an answer can be read");
    let mut answer = read(first.ok()?);
    if answer.metadata.truncation && answer.metadata.response_code == ResponseCode::NoError {
        assert!(!by_tcp_at_once, "{}: cut by TCP", case.name);
        answer = read(by_tcp(server, &question).ok()?);
    }
    assert_eq!(answer.metadata.id, id);
    Some(answer)
}

/// Asks until `stop`.
fn client(seed: u64, vips: &[String], tally: &Tally, excuse: &Excuse, stop: &AtomicBool) {
    let mut rng = StdRng::seed_from_u64(seed);
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(PACE);
        let case = case(&mut rng, vips);
        let server = SocketAddr::new(DNS.choose(&mut rng).unwrap().parse().unwrap(), 53);
        let since = Instant::now();
        let answer = ask(server, &case, &mut rng);
        let took = since.elapsed();
        count(&tally.asked);
        let what = format!("{} {} of {server}, seed {seed}", case.name, case.kind);
        match answer {
            Some(answer) if answer.metadata.response_code != ResponseCode::ServFail => {
                let said = (answer.metadata.response_code, texts(&answer.answers));
                assert_eq!(said, (case.code, case.records), "{what}: a wrong answer");
                count(&tally.right);
            }
            failed => {
                assert!(!case.of_cluster, "{what}: {failed:?} after {took:?}");
                let excused = excuse.holds(since);
                count(if excused { &tally.excused } else { &tally.owed });
                if !excused {
                    println!(
                        "{what}: {:?} after {took:?}",
                        failed.map(|answer| answer.metadata.response_code)
                    );
                }
            }
        }
        if case.of_cluster {
            let micros = u64::try_from(took.as_micros()).unwrap();
            tally.longest_cluster_micros.fetch_max(micros, Ordering::Relaxed);
        }
    }
}

/// Each upstream another manner every two seconds; now and then both are unusable.
fn change_manners(rng: &mut StdRng, upstreams: &[Upstream; 2], excuse: &Excuse, until: Instant) {
    while Instant::now() < until {
        let bad = rng.random_range(0..5);
        let manner = |good: bool, rng: &mut StdRng| {
            *if good { Manner::USABLE.choose(rng) } else { Manner::UNUSABLE.choose(rng) }.unwrap()
        };
        // None, one, the other or both of them.
        let manners = [manner(bad != 1 && bad != 3, rng), manner(bad != 2 && bad != 3, rng)];
        if bad == 3 {
            excuse.begins();
        }
        println!("{manners:?}");
        for (upstream, manner) in upstreams.iter().zip(manners) {
            upstream.set(manner);
        }
        std::thread::sleep(STEP);
        if bad == 3 {
            upstreams.iter().for_each(|upstream| upstream.set(Manner::Right));
            excuse.ends();
        }
    }
}

#[test]
fn no_answer_is_wrong_while_the_api_server_is_away_and_upstreams_die_lie_and_delay() {
    inside(|| {
        let seconds =
            std::env::var("WEFT_SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(30);
        let seed = std::env::var("WEFT_SOAK_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
        ip(&format!("addr add {}/32 dev lo", UPSTREAMS[0]));
        ip(&format!("addr add {}/128 dev lo nodad", UPSTREAMS[1]));
        let mut node = Node::running();
        write(&node.path("resolv.conf"), UPSTREAMS.map(|address| format!("nameserver {address}\n")).concat());
        let vips = make_service(node.api(), "web", &["10.244.9.9", "fd00:10:244:9::9"]);
        until("the Service's name", || dig(DNS[0], "web.default.svc.cluster.local", "A") == vips[..1]);
        node.stop_server();
        let upstreams = UPSTREAMS.map(Upstream::new);
        let (tally, excuse, stop) = (Tally::default(), Excuse(Mutex::default()), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let serving: Vec<_> = upstreams.iter().map(|upstream| scope.spawn(|| upstream.run())).collect();
            until("the upstreams", || dig(DNS[1], "a1.soak.example", "A") == ["198.18.0.1"]);
            let (vips, tally, excuse, stop) = (&vips, &tally, &excuse, &stop);
            let clients: Vec<_> = (0..CLIENTS)
                .map(|i| scope.spawn(move || client(seed * CLIENTS + i, vips, tally, excuse, stop)))
                .collect();
            let until = Instant::now() + Duration::from_secs(seconds);
            change_manners(&mut StdRng::seed_from_u64(seed), &upstreams, excuse, until);
            stop.store(true, Ordering::SeqCst);
            let clients: Vec<_> = clients.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
            upstreams.iter().for_each(Upstream::end);
            serving.into_iter().for_each(|thread| thread.join().unwrap());
            assert!(clients.into_iter().all(|client| client.is_ok()), "a client found something wrong");
        });
        let get = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
        let (asked, right, owed) = (get(&tally.asked), get(&tally.right), get(&tally.owed));
        println!(
            "{asked} questions, {right} answered and right, {} failed while no upstream was usable, {owed} though one was; upstreams were asked {} and {} times; \
             longest for a name of the cluster {} us",
            get(&tally.excused),
            upstreams[0].asked(),
            upstreams[1].asked(),
            get(&tally.longest_cluster_micros),
        );
        assert!(asked > seconds * 20 && upstreams.iter().all(|upstream| upstream.asked() > 100));
        assert_eq!(owed, 0);
    });
}
