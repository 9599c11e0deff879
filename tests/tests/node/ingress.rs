//! The process of the ingress beside a real agent: requests go on while it is restarted, and what it must not lose it keeps.

use std::io::{IoSliceMut, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::cmsg_space;
use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};
use serde_json::json;
use weft_tests::node::{Node, Process, UPLINK_ADDRESSES, inside, until};

use crate::objects::make_service;

const INGRESSES: &str = "/apis/networking.k8s.io/v1/namespaces/default/ingresses";
/// Where the ingress of the node listens, IPv4 first.
const LISTENS: [&str; 2] = ["10.244.0.2:8080", "[fd00:10:244::2]:8080"];

/// Plays the service manager: keeps the sockets that it is given, and hands them to the next process (sd_listen_fds(3)).
struct ServiceManager {
    socket: UnixDatagram,
    kept: Vec<RawFd>,
}

impl ServiceManager {
    fn new(node: &Node) -> Self {
        let path = node.path("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self { socket, kept: Vec::new() }
    }

    /// Takes what has come. Descriptors are inherited by what is started afterwards.
    fn hear(&mut self) {
        loop {
            let mut buffer = [0; 256];
            let mut space = cmsg_space!([RawFd; 4]);
            let mut pieces = [IoSliceMut::new(&mut buffer)];
            let heard = recvmsg::<UnixAddr>(
                self.socket.as_raw_fd(),
                &mut pieces,
                Some(&mut space),
                MsgFlags::empty(),
            );
            let Ok(message) = heard else { return };
            for control in message.cmsgs().unwrap() {
                if let ControlMessageOwned::ScmRights(descriptors) = control {
                    self.kept.extend(descriptors);
                }
            }
        }
    }

    /// `weft ingress serve` with two threads and the kept sockets from descriptor 3 on.
    fn start(&mut self, node: &Node) -> Process {
        self.hear();
        let high = |index: usize| 100 + index;
        let mut line = String::new();
        for (index, descriptor) in self.kept.iter().enumerate() {
            line.push_str(&format!("exec {}<&{descriptor}; ", high(index)));
        }
        for index in 0..self.kept.len() {
            line.push_str(&format!("exec {}<&{}; ", 3 + index, high(index)));
        }
        line.push_str(&format!("LISTEN_PID=$$ LISTEN_FDS={} exec \"$@\"", self.kept.len()));
        let serve = node.weft("ingress");
        let mut command = Command::new("bash");
        command.args(["-c", &line, "bash"]).arg(serve.get_program()).args([
            "ingress",
            "serve",
            "--threads",
            "2",
        ]);
        command.arg("--run-dir").arg(node.path("run")).env("NOTIFY_SOCKET", node.path("notify"));
        Process::start("ingress", &mut command, &node.path("."))
    }
}

/// Answers `name` to every request; to `/slow` after two seconds.
fn backend() {
    for address in UPLINK_ADDRESSES {
        let listener = TcpListener::bind((address, 8080)).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || while answer_one(&stream).is_some() {});
            }
        });
    }
}

fn answer_one(mut stream: &TcpStream) -> Option<()> {
    let head = head_of(stream)?;
    if head.starts_with("GET /slow") {
        std::thread::sleep(Duration::from_secs(2));
    }
    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nname").ok()
}

fn head_of(stream: &TcpStream) -> Option<String> {
    let mut reader = stream;
    let (mut head, mut byte) = (Vec::new(), [0; 1]);
    while !head.ends_with(b"\r\n\r\n") {
        if reader.read(&mut byte).ok()? == 0 {
            return None;
        }
        head.push(byte[0]);
    }
    String::from_utf8(head).ok()
}

/// One request; whether the connection may be used again. `None` when it was lost.
fn ask(mut stream: &TcpStream, path: &str) -> Option<bool> {
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: a.com\r\n\r\n").as_bytes()).ok()?;
    let head = head_of(stream)?.to_ascii_lowercase();
    let mut body = [0; 4];
    stream.read_exact(&mut body).ok()?;
    (head.starts_with("http/1.1 200") && &body == b"name").then(|| !head.contains("connection: close"))
}

fn dial(address: &str) -> Option<TcpStream> {
    let stream = TcpStream::connect(address.parse::<SocketAddr>().unwrap()).ok()?;
    stream.set_nodelay(true).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(20))).ok()?;
    Some(stream)
}

/// Clients that ask one request after another, on kept connections and on new ones, in both families.
#[derive(Default)]
struct Counts {
    answered: AtomicU64,
    lost: AtomicU64,
    longest_ms: AtomicU64,
    stop: AtomicBool,
}

fn load(counts: &Arc<Counts>) -> Vec<JoinHandle<()>> {
    let kinds = LISTENS.into_iter().flat_map(|address| [(address, true), (address, true), (address, false)]);
    kinds
        .map(|(address, keeps)| {
            let counts = counts.clone();
            std::thread::spawn(move || {
                let mut kept: Option<TcpStream> = None;
                while !counts.stop.load(Ordering::Relaxed) {
                    let started = Instant::now();
                    let stream = kept.take().or_else(|| dial(address));
                    match stream.as_ref().and_then(|stream| ask(stream, "/")) {
                        Some(again) => {
                            counts.answered.fetch_add(1, Ordering::Relaxed);
                            kept = stream.filter(|_| again && keeps);
                        }
                        None => drop(counts.lost.fetch_add(1, Ordering::Relaxed)),
                    }
                    let took = u64::try_from(started.elapsed().as_millis()).unwrap();
                    counts.longest_ms.fetch_max(took, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(1));
                }
            })
        })
        .collect()
}

/// A node whose ingress leads `a.com` to [`backend`].
fn node_with_ingress() -> (Node, ServiceManager, Process) {
    let mut node = Node::new();
    backend();
    // The user of the ingress has to come through.
    std::fs::set_permissions(node.path("."), std::fs::Permissions::from_mode(0o755)).unwrap();
    node.start_server();
    node.make_node_object();
    let mut agent = node.agent_command();
    node.start_agent_with(agent.args(["--ingress", "on"]));
    node.start_tunnel();
    let mut manager = ServiceManager::new(&node);
    let ingress = manager.start(&node);
    node.await_ready();
    make_service(node.api(), "web", &UPLINK_ADDRESSES);
    let backend = json!({"service": {"name": "web", "port": {"number": 80}}});
    let paths = json!([{"path": "/", "pathType": "Prefix", "backend": backend}]);
    let spec = json!({"ingressClassName": "weft", "rules": [{"host": "a.com", "http": {"paths": paths}}]});
    node.api().create(INGRESSES, &json!({"metadata": {"name": "web"}, "spec": spec}));
    until("an answer", || {
        LISTENS.iter().all(|address| dial(address).is_some_and(|stream| ask(&stream, "/").is_some()))
    });
    (node, manager, ingress)
}

#[test]
fn a_restart_of_the_ingress_under_load_loses_no_request_and_nobody_waits_for_slow_ones() {
    inside(|| {
        let (node, mut manager, mut ingress) = node_with_ingress();
        let counts = Arc::new(Counts::default());
        let clients = load(&counts);
        for _ in 0..4 {
            std::thread::sleep(Duration::from_millis(500));
            let slow = LISTENS.map(|address| {
                let stream = dial(address).unwrap();
                std::thread::spawn(move || ask(&stream, "/slow"))
            });
            std::thread::sleep(Duration::from_millis(300));
            assert!(ingress.end(Signal::SIGTERM).success());
            // As long as systemd waits (RestartSec).
            std::thread::sleep(Duration::from_millis(200));
            ingress = manager.start(&node);
            for slow in slow {
                assert_eq!(
                    slow.join().unwrap(),
                    Some(false),
                    "answered, with the word that it is the last one"
                );
            }
        }
        std::thread::sleep(Duration::from_millis(500));
        counts.stop.store(true, Ordering::Relaxed);
        clients.into_iter().for_each(|client| client.join().unwrap());
        let [answered, lost, longest] =
            [&counts.answered, &counts.lost, &counts.longest_ms].map(|count| count.load(Ordering::Relaxed));
        println!("{answered} answered, {lost} lost, the longest took {longest} ms");
        assert_eq!((lost, answered > 2_000), (0, true), "{answered} answered");
        assert!(longest < 1_900, "somebody waited {longest} ms for the slow requests of others");
        assert_eq!(manager.kept.len(), 8, "two threads, two ports, two families, and none twice");
        drop(ingress);
    });
}

#[test]
fn who_comes_while_the_ingress_is_dead_waits_for_the_next_one() {
    inside(|| {
        let (node, mut manager, ingress) = node_with_ingress();
        manager.hear();
        ingress.end(Signal::SIGKILL);
        let waiting = LISTENS.map(|address| {
            let stream = dial(address).expect("the socket listens still");
            std::thread::spawn(move || ask(&stream, "/"))
        });
        std::thread::sleep(Duration::from_millis(300));
        let _ingress = manager.start(&node);
        for client in waiting {
            assert!(client.join().unwrap().is_some());
        }
    });
}
