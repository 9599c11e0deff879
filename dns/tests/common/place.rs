//! A network and mount namespace of a test's own with the DNS room running in it, and resolvers of a "host".
#![allow(dead_code, reason = "each test binary uses a part")]

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, MessageType};
use hickory_proto::rr::{RData, Record, RecordType};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use weft_dns::{DnsApplier, DnsPlanner, Options};
use weft_model::Snapshot;
use weft_netstack::reconcile::{Applied, Applier as _, Planner as _, Trust};

/// Runs a test in namespaces that end with it. Everything the test starts must be started inside.
pub(crate) fn in_namespace(test: impl FnOnce(&mut Place) + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: needs root");
        return;
    }
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        run("ip link set lo up");
        test(&mut Place::new());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// The output of a command that must succeed.
#[track_caller]
pub(crate) fn run(command: &str) -> String {
    let (program, arguments) = command.split_once(' ').unwrap();
    let output = Command::new(program).args(arguments.split(' ')).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{command}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// The output of a command that may fail.
pub(crate) fn attempt(command: &str) -> String {
    let (program, arguments) = command.split_once(' ').unwrap();
    let output = Command::new(program).args(arguments.split(' ')).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) struct Place {
    pub(crate) runtime: tokio::runtime::Runtime,
    directory: tempfile::TempDir,
    pub(crate) planner: DnsPlanner,
    pub(crate) applier: Option<DnsApplier>,
    pub(crate) stats: Arc<weft_dns::Stats>,
    pub(crate) explainer: Option<weft_dns::Explainer>,
    coredns_names: Option<weft_dns::CorednsNames>,
    /// For the next start.
    pub(crate) handover: weft_dns::Handover,
    /// For the next start.
    pub(crate) queries_per_second: Option<u32>,
}

impl Place {
    fn new() -> Self {
        Self {
            runtime: tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap(),
            directory: tempfile::tempdir().unwrap(),
            planner: DnsPlanner::default(),
            applier: None,
            stats: Arc::default(),
            explainer: None,
            coredns_names: None,
            handover: weft_dns::Handover::default(),
            queries_per_second: None,
        }
    }

    pub(crate) fn upstream_conf(&self) -> PathBuf {
        self.directory.path().join("upstream.conf")
    }

    /// The host's resolvers from now on.
    pub(crate) fn nameservers(&self, servers: &[&str]) {
        let text: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
        std::fs::write(self.upstream_conf(), text).unwrap();
    }

    /// What the C library of this namespace reads, as a pod would have it.
    pub(crate) fn pod_resolv_conf(&self, text: &str) {
        let path = self.directory.path().join("pod.conf");
        std::fs::write(&path, text).unwrap();
        let none = None::<&str>;
        mount(Some(&path), Path::new("/etc/resolv.conf"), none, MsFlags::MS_BIND, none).unwrap();
        // The C library asks only for families in which the pod has an address beyond loopback.
        run("ip link add eth0 type bridge");
        run("ip address add 10.42.0.1/32 dev eth0");
        run("ip address add fd00:42::1/128 dev eth0 nodad");
        run("ip link set eth0 up");
    }

    /// The routes of the overlay room that make the cluster DNS addresses local.
    pub(crate) fn route_cluster_dns(&self) {
        run("ip route add local 10.43.0.10 dev lo");
        run("ip -6 route add local fd00:43::a dev lo");
    }

    /// Starts the DNS room on port 53, without a plan yet.
    pub(crate) fn start(&mut self) {
        let _inside = self.runtime.enter();
        let options = Options {
            resolv_conf: self.upstream_conf(),
            queries_per_second: self.queries_per_second,
            ..Options::default()
        };
        // Who asks from loopback is a pod of `default`.
        let namespaces = Arc::new(|ip: std::net::IpAddr| ip.is_loopback().then(|| "default".to_owned()));
        let handover = std::mem::take(&mut self.handover);
        let dns = weft_dns::start(&super::config(), options, handover, namespaces);
        (self.planner, self.applier, self.stats) = (dns.planner, Some(dns.applier), dns.stats);
        (self.explainer, self.coredns_names) = (Some(dns.explainer), Some(dns.coredns_names));
    }

    /// What a Prometheus would read under CoreDNS's names.
    pub(crate) fn metrics(&self) -> String {
        let mut registry = prometheus_client::registry::Registry::default();
        registry.register_collector(Box::new(self.coredns_names.clone().unwrap()));
        let mut page = String::new();
        prometheus_client::encoding::text::encode(&mut page, &registry).unwrap();
        page
    }

    /// The sum of the samples whose name and labels begin so.
    pub(crate) fn metric(&self, begin: &str) -> f64 {
        let page = self.metrics();
        let values =
            page.lines().filter(|line| line.starts_with(begin)).filter_map(|line| line.rsplit(' ').next());
        values.map(|value| value.parse::<f64>().unwrap()).sum()
    }

    pub(crate) fn apply(&mut self, snapshot: &Snapshot) -> Applied {
        let planned = self.planner.plan(snapshot);
        let applier = self.applier.as_mut().unwrap();
        self.runtime.block_on(applier.apply(&planned.plan, Trust::Nothing))
    }

    /// Everything: routes, a resolver-less host, a plan.
    pub(crate) fn serve(&mut self, snapshot: &Snapshot) {
        self.route_cluster_dns();
        self.start();
        let applied = self.apply(snapshot);
        assert_eq!(applied.failed, Vec::<String>::new());
    }

    /// Ends the DNS room, its sockets included.
    pub(crate) fn stop(&mut self) {
        let _inside = self.runtime.enter();
        self.applier = None;
    }
}

/// `dig` against the IPv4 cluster DNS address, one try; white space between words is one space.
#[track_caller]
pub(crate) fn dig(arguments: &str) -> String {
    let text = run(&format!("dig @10.43.0.10 +tries=1 +time=6 {arguments}"));
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    text.lines().map(words).collect::<Vec<_>>().join("\n")
}

pub(crate) fn dig_short(arguments: &str) -> Vec<String> {
    dig(&format!("+short {arguments}")).lines().map(str::to_owned).collect()
}

/// Tries until it holds, at most for five seconds.
#[track_caller]
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(5);
    while !holds() {
        assert!(Instant::now() < until, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// What a test resolver does with a question before it answers properly by TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    Plain,
    /// Garbage and empty replies with a wrong id, a wrong question and no response flag first, then the answer.
    ForgeriesFirst,
    /// By UDP only "truncated".
    Truncate,
    /// By UDP a part and "truncated", by TCP nothing.
    TruncateForGood,
    /// SERVFAIL to everything.
    Fail,
    /// FORMERR to whatever has an OPT record.
    NoEdns,
    /// The question comes back in lower case.
    LowerCase,
    /// Records that nobody asked for stand in every section.
    Stuffed,
    /// The answer comes after a quarter of a second.
    Slow,
}

/// A resolver of the host with the names it was given.
pub(crate) struct Upstream {
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
    asked: Arc<AtomicUsize>,
    pub(crate) last: Arc<Mutex<Option<Message>>>,
}

type Answers = BTreeMap<(String, RecordType), Vec<Record>>;

impl Upstream {
    pub(crate) fn start(address: &str, manner: Manner, records: Vec<Record>) -> Self {
        let address = SocketAddr::new(address.parse().unwrap(), 53);
        let (stop, asked, last) =
            (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default(), Arc::default());
        let mut answers = Answers::new();
        for record in records {
            let key = (record.name.to_lowercase().to_string(), record.record_type());
            answers.entry(key).or_default().push(record);
        }
        let shared = Arc::new(Serving {
            manner,
            answers,
            stop: Arc::clone(&stop),
            asked: asked.clone(),
            last: Arc::clone(&last),
        });
        let udp = UdpSocket::bind(address).unwrap();
        udp.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let tcp = TcpListener::bind(address).unwrap();
        tcp.set_nonblocking(true).unwrap();
        let also = shared.clone();
        let threads =
            vec![std::thread::spawn(move || shared.udp(&udp)), std::thread::spawn(move || also.tcp(&tcp))];
        Self { stop, threads, asked, last }
    }

    /// The same over TLS on port 853, and nothing else; `certificate` and its key in PEM.
    pub(crate) fn start_tls(
        address: &str,
        (certificate, key): (&str, &str),
        records: Vec<Record>,
    ) -> TlsUpstream {
        use rustls::pki_types::pem::PemObject as _;
        let chain = rustls::pki_types::CertificateDer::pem_slice_iter(certificate.as_bytes());
        let key = rustls::pki_types::PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain.map(Result::unwrap).collect(), key)
            .unwrap();
        let mut answers = Answers::new();
        for record in records {
            let key = (record.name.to_lowercase().to_string(), record.record_type());
            answers.entry(key).or_default().push(record);
        }
        let (stop, asked, last) =
            (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default(), Arc::default());
        let serving = Serving {
            manner: Manner::Plain,
            answers,
            stop: Arc::clone(&stop),
            asked: asked.clone(),
            last: Arc::clone(&last),
        };
        let listener = TcpListener::bind(SocketAddr::new(address.parse().unwrap(), 853)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let (connections, hang_up) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let (counted, told) = (connections.clone(), hang_up.clone());
        let thread = std::thread::spawn(move || serving.tls(&listener, &Arc::new(config), &counted, &told));
        TlsUpstream { of: Self { stop, threads: vec![thread], asked, last }, connections, hang_up }
    }

    pub(crate) fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ended = thread.join();
        }
    }
}

/// A resolver of the host that is asked over TLS.
pub(crate) struct TlsUpstream {
    pub(crate) of: Upstream,
    connections: Arc<AtomicUsize>,
    hang_up: Arc<AtomicBool>,
}

impl TlsUpstream {
    /// Whose handshake was made to the end.
    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    /// Every connection is closed after one answer, those that are open at once.
    pub(crate) fn hang_up(&self) {
        self.hang_up.store(true, Ordering::SeqCst);
    }
}

struct Serving {
    manner: Manner,
    answers: Answers,
    stop: Arc<AtomicBool>,
    asked: Arc<AtomicUsize>,
    last: Arc<Mutex<Option<Message>>>,
}

impl Serving {
    fn udp(&self, socket: &UdpSocket) {
        let mut buffer = [0; 4096];
        while !self.stop.load(Ordering::SeqCst) {
            let Ok((length, client)) = socket.recv_from(&mut buffer) else { continue };
            let query = Message::from_vec(&buffer[..length]).unwrap();
            for reply in self.udp_replies(&query) {
                socket.send_to(&reply, client).unwrap();
            }
        }
    }

    fn udp_replies(&self, query: &Message) -> Vec<Vec<u8>> {
        use hickory_proto::op::ResponseCode::{FormErr, ServFail};
        let mut reply = self.reply(query);
        match self.manner {
            Manner::Plain => {}
            Manner::ForgeriesFirst => {
                let mut forged = reply.clone();
                forged.answers.clear();
                let mut wrong_id = forged.clone();
                wrong_id.metadata.id = wrong_id.metadata.id.wrapping_add(1);
                let mut wrong_question = forged.clone();
                wrong_question.queries[0].name = "other.example.".parse().unwrap();
                let mut not_a_response = forged;
                not_a_response.metadata.message_type = MessageType::Query;
                let mut all = vec![b"garbage".to_vec()];
                all.extend([wrong_id, wrong_question, not_a_response, reply].map(|m| m.to_vec().unwrap()));
                return all;
            }
            Manner::TruncateForGood => reply.metadata.truncation = true,
            Manner::Truncate => {
                reply.answers.clear();
                reply.metadata.truncation = true;
            }
            Manner::Fail => reply.metadata.response_code = ServFail,
            Manner::NoEdns if query.edns.is_some() => reply.metadata.response_code = FormErr,
            Manner::NoEdns => {}
            Manner::LowerCase => reply.queries[0].name = reply.queries[0].name.to_lowercase(),
            Manner::Stuffed => {
                let lie = hickory_proto::rr::rdata::A::new(203, 0, 113, 66);
                let lie = Record::from_rdata("bank.example.".parse().unwrap(), 60, RData::A(lie));
                reply.answers.push(lie.clone());
                reply.authorities.push(lie.clone());
                reply.additionals.push(lie);
            }
            Manner::Slow => std::thread::sleep(Duration::from_millis(250)),
        }
        vec![reply.to_vec().unwrap()]
    }

    fn tcp(&self, listener: &TcpListener) {
        while !self.stop.load(Ordering::SeqCst) {
            let Ok((mut stream, _)) = listener.accept() else {
                std::thread::sleep(Duration::from_millis(5));
                continue;
            };
            if self.manner == Manner::TruncateForGood {
                continue;
            }
            stream.set_nonblocking(false).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            let mut length = [0; 2];
            stream.read_exact(&mut length).unwrap();
            let mut bytes = vec![0; usize::from(u16::from_be_bytes(length))];
            stream.read_exact(&mut bytes).unwrap();
            let reply = self.reply(&Message::from_vec(&bytes).unwrap()).to_vec().unwrap();
            let length = u16::try_from(reply.len()).unwrap().to_be_bytes();
            stream.write_all(&[&length[..], &reply].concat()).unwrap();
        }
    }

    fn tls(
        &self,
        listener: &TcpListener,
        config: &Arc<rustls::ServerConfig>,
        connections: &AtomicUsize,
        hang_up: &AtomicBool,
    ) {
        std::thread::scope(|scope| {
            while !self.stop.load(Ordering::SeqCst) {
                let Ok((stream, _)) = listener.accept() else {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                };
                stream.set_nonblocking(false).unwrap();
                stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
                let connection = rustls::ServerConnection::new(config.clone()).unwrap();
                scope.spawn(move || {
                    let mut stream = rustls::StreamOwned::new(connection, stream);
                    let ended = self.converse(&mut stream, connections, hang_up);
                    assert!(
                        ended.is_err() || hang_up.load(Ordering::SeqCst) || self.stop.load(Ordering::SeqCst)
                    );
                });
            }
        });
    }

    /// Until the client closes, or refuses the certificate.
    fn converse(
        &self,
        stream: &mut rustls::StreamOwned<rustls::ServerConnection, std::net::TcpStream>,
        connections: &AtomicUsize,
        hang_up: &AtomicBool,
    ) -> std::io::Result<()> {
        let mut bytes = Vec::new();
        let mut is_new = true;
        while !self.stop.load(Ordering::SeqCst) && (is_new || !hang_up.load(Ordering::SeqCst)) {
            let mut piece = [0; 512];
            match stream.read(&mut piece) {
                Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                Ok(length) => bytes.extend_from_slice(&piece[..length]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            let Some((length, rest)) = bytes.split_first_chunk::<2>() else { continue };
            let Some(message) = rest.get(..usize::from(u16::from_be_bytes(*length))) else { continue };
            connections.fetch_add(usize::from(std::mem::take(&mut is_new)), Ordering::SeqCst);
            let reply = self.reply(&Message::from_vec(message).unwrap()).to_vec().unwrap();
            bytes.clear();
            let length = u16::try_from(reply.len()).unwrap().to_be_bytes();
            stream.write_all(&[&length[..], &reply].concat())?;
            stream.flush()?;
        }
        Ok(())
    }

    fn reply(&self, query: &Message) -> Message {
        self.asked.fetch_add(1, Ordering::SeqCst);
        *self.last.lock().unwrap() = Some(query.clone());
        let mut reply = query.clone();
        reply.metadata.message_type = MessageType::Response;
        reply.metadata.recursion_available = true;
        let asked = &query.queries[0];
        let name = asked.name.to_lowercase().to_string();
        match self.answers.get(&(name.clone(), asked.query_type)) {
            Some(records) => reply.answers.clone_from(records),
            None if self.answers.keys().any(|(known, _)| *known == name) => {}
            None => reply.metadata.response_code = hickory_proto::op::ResponseCode::NXDomain,
        }
        reply
    }
}
