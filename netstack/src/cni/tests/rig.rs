//! A node with an uplink, its agent's CNI half, and pods.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::net::if_::if_nametoindex;
use serde_json::{Value, json};
use tokio::sync::watch;
use weft_model::node_facts::{NodeFacts, Uplink, WireguardBackend};
use weft_model::objects::Node;
use weft_model::snapshot::Attachments;
use weft_model::{ClusterConfig, Generation, NodeName, Report, Snapshot};

use crate::cni::bandwidth::ifb_of;
use crate::cni::{Attachment, Caller, Cni, Inputs, server};
use crate::kernel::testing::NamedNetns;
use crate::policy::{PolicyApplier, PolicyPlanner};
use crate::reconcile::{Loop, Pace};
use crate::store::{LeaseRecords, Leases};

pub(super) struct Rig {
    pub(super) node: NamedNetns,
    pub(super) folder: tempfile::TempDir,
}

/// The agent of one life.
pub(super) struct Agent {
    pub(super) cni: Arc<Cni>,
    pub(super) leases: Arc<Leases>,
    pub(super) snapshots: watch::Sender<Option<Arc<Snapshot>>>,
    pub(super) socket: PathBuf,
    server: tokio::task::JoinHandle<()>,
}

impl Rig {
    pub(super) fn new() -> Self {
        let node = NamedNetns::new("node");
        for command in [
            &["ip", "link", "set", "lo", "up"][..],
            &["ip", "link", "add", "up0", "type", "veth", "peer", "name", "up0p"],
            &["ip", "addr", "add", "192.0.2.1/24", "dev", "up0"],
            &["ip", "addr", "add", "2001:db8::1/64", "dev", "up0", "nodad"],
            &["ip", "link", "set", "up0", "up"],
            &["ip", "link", "set", "up0p", "up"],
            &["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"],
        ] {
            node.must(command);
        }
        Self { node, folder: tempfile::tempdir().unwrap() }
    }

    pub(super) fn leases(&self) -> PathBuf {
        self.folder.path().join("run/leases")
    }

    /// Starts the agent as the wiring does: store, reconcile, socket.
    pub(super) async fn start(&self) -> Agent {
        self.start_with(snapshot(&["10.244.1.0/24", "fd00:244:1::/64"])).await
    }

    pub(super) async fn start_with(&self, snapshot: Snapshot) -> Agent {
        let told = watch::channel(Attachments::default()).0;
        self.start_told(watch::channel(Some(Arc::new(snapshot))).0, told, None).await
    }

    /// With policies, whose loop sees a Snapshot with the attachments of now only after `delay`, as if watch and agent were slow.
    pub(super) async fn start_under_policies(&self, snapshot: Snapshot, delay: Duration) -> Agent {
        let (snapshots_tx, snapshots) = watch::channel(Some(Arc::new(snapshot)));
        let (told_tx, mut told) = watch::channel(Attachments::default());
        let (planner, applier) = (PolicyPlanner::default(), PolicyApplier::new());
        let (run, handle) = Loop::new("policy", planner, applier, Pace::default(), snapshots);
        tokio::spawn(run.run());
        let publisher = snapshots_tx.clone();
        tokio::spawn(async move {
            while told.changed().await.is_ok() {
                tokio::time::sleep(delay).await;
                let attachments = told.borrow_and_update().clone();
                publisher.send_modify(|snapshot| {
                    let before = snapshot.as_deref().unwrap().clone();
                    let generation = before.generation.next();
                    *snapshot = Some(Arc::new(Snapshot { generation, attachments, ..before }));
                });
            }
        });
        self.start_told(snapshots_tx, told_tx, Some(handle.reports())).await
    }

    async fn start_told(
        &self,
        snapshots: watch::Sender<Option<Arc<Snapshot>>>,
        told: watch::Sender<Attachments>,
        verdicts: Option<watch::Receiver<Report>>,
    ) -> Agent {
        let leases = Arc::new(Leases::open(self.leases()).unwrap());
        let receiver = snapshots.subscribe();
        let inputs = Inputs {
            snapshots: receiver,
            leases: leases.clone(),
            readiness: Arc::new(|snapshot| match snapshot.map(|snapshot| snapshot.generation) {
                None => Err("no API server yet".to_owned()),
                Some(Generation(0)) => Err("the overlay is not programmed yet".to_owned()),
                Some(_) => Ok(()),
            }),
            pod_mtu_bytes: Arc::new(|_| 1420),
            attachments: told,
            verdicts,
        };
        let cni = Arc::new(Cni::open(inputs).unwrap());
        let reconciled = cni.reconcile().await;
        assert_eq!(reconciled.failed, Vec::<String>::new());
        let socket = self.folder.path().join("agent.sock");
        let _ = std::fs::remove_file(&socket);
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let router = server::router(cni.clone()).into_make_service_with_connect_info::<Caller>();
        let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Agent { cni, leases, snapshots, socket, server }
    }
}

/// `up0` with these.
pub(in crate::cni) fn uplink(addresses: &[&str]) -> Uplink {
    Uplink {
        name: "up0".to_owned(),
        index: 2,
        mtu_bytes: 1500,
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        subnets: vec![],
    }
}

pub(in crate::cni) fn snapshot(pod_cidrs: &[&str]) -> Snapshot {
    let name = NodeName::from("n1");
    let node = Node {
        name: name.clone(),
        uid: "1".to_owned(),
        created: 0,
        labels: BTreeMap::new(),
        pod_cidrs: pod_cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(),
        internal_ips: vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
        leaving: false,
        cordoned: false,
        links: None,
        public_key: None,
        next_public_key: None,
        answers_for: Default::default(),
        unready: false,
        reach: Default::default(),
        wireguard_port: None,
    };
    Snapshot {
        generation: Generation(1),
        config: Arc::new(ClusterConfig::default()),
        facts: Arc::new(NodeFacts {
            name: name.clone(),
            uplinks: vec![uplink(&["192.0.2.1", "2001:db8::1"])],
            wireguard_backend: WireguardBackend::Userspace,
            foreign_routes: vec![],
            loopback: Default::default(),
            observed: Default::default(),
        }),
        nodes: Arc::new([(name, Arc::new(node))].into()),
        config_maps: Default::default(),
        namespaces: Arc::default(),
        services: Arc::default(),
        endpoint_slices: Arc::default(),
        pods: Arc::default(),
        policies: Arc::default(),
        ingress_classes: Arc::default(),
        ingresses: Arc::default(),
        referred: Arc::default(),
        address_pools: Arc::default(),
        l2_advertisements: Arc::default(),
        service_cidrs: Arc::default(),
        attachments: Arc::default(),
        problems: Arc::default(),
        from_store: false,
    }
}

impl Agent {
    /// No good-bye: what is not in a file or the kernel is lost.
    pub(super) async fn kill(self) {
        self.server.abort();
        let _ = self.server.await;
        while Arc::strong_count(&self.cni) > 1 {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    }

    /// Runs the plugin as a runtime does; `Err` is the CNI error object.
    pub(super) async fn call(&self, verb: &str, id: &str, netns: &str, extra: Value) -> Result<Value, Value> {
        let mut config =
            json!({"cniVersion": "1.1.0", "name": "weft", "type": "weft", "socket": self.socket});
        if let (Some(config), Value::Object(extra)) = (config.as_object_mut(), extra) {
            config.extend(extra);
        }
        let variables: BTreeMap<String, String> = [
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", id),
            ("CNI_NETNS", netns),
            ("CNI_IFNAME", "eth0"),
            ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_UID=42"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
        let printed = tokio::task::spawn_blocking(move || {
            weft_plugin::execute(&|name| variables.get(name).cloned(), &config.to_string())
        })
        .await
        .unwrap();
        let value = match printed.stdout.as_str() {
            "" => Value::Null,
            text => serde_json::from_str(text).unwrap(),
        };
        if printed.failed { Err(value) } else { Ok(value) }
    }

    /// ADD that must succeed: the pod's addresses.
    pub(super) async fn add(&self, id: &str, pod: &NamedNetns) -> Vec<IpAddr> {
        addresses(&self.call("ADD", id, &pod.path(), Value::Null).await.unwrap())
    }

    /// The links go a moment after the answer.
    pub(super) async fn del(&self, id: &str, netns: &str) {
        self.call("DEL", id, netns, Value::Null).await.unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        let link = link_of(id);
        while [link.as_str(), &ifb_of(&link)].iter().any(|name| if_nametoindex(*name).is_ok()) {
            assert!(Instant::now() < deadline, "{link} of {id} stays");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    pub(super) fn live(&self) -> LeaseRecords {
        let mut leases = LeaseRecords::clone(&self.leases.records());
        leases.retain(|_, lease| lease.released.is_none());
        leases
    }
}

pub(super) fn addresses(result: &Value) -> Vec<IpAddr> {
    let ips = result["ips"].as_array().unwrap();
    ips.iter().map(|ip| ip["address"].as_str().unwrap().parse::<ipnet::IpNet>().unwrap().addr()).collect()
}

pub(super) fn link_of(id: &str) -> String {
    Attachment::new(id, "eth0").link
}

pub(super) fn pod_links(node: &NamedNetns) -> usize {
    node.must(&["ip", "-o", "link"]).matches(": weftp").count()
}

/// Overwrites every file below with other bytes.
pub(super) fn fill_with_garbage(path: &Path) {
    for entry in std::fs::read_dir(path).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            fill_with_garbage(&path);
        } else {
            std::fs::write(&path, vec![0xa5; 4096]).unwrap();
        }
    }
}
