//! The lab as a place to measure in: three nodes, a client and a switch, with pods behind a Service on every node.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use k8s_openapi::api::core::v1::{Node, Service};
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;

use crate::rig::ip;

pub(super) const NODES: [&str; 3] = ["node1", "node2", "node3"];
/// So many dual-stack Services that both addresses of one are answered for by the same node, whatever the hashes are.
const SERVICES: usize = 24;

pub(super) struct Lab {
    weft: PathBuf,
    client: kube::Client,
    runtime: tokio::runtime::Runtime,
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = Command::new(&self.weft).args(["lab", "down"]).stdout(Stdio::null()).status();
    }
}

impl Lab {
    /// Where the machine keeps a lab of its own, this one has private folders.
    pub(super) fn up(weft: &Path) -> anyhow::Result<Self> {
        ip("link set lo up")?;
        for folder in ["/run", "/var/lib"] {
            output(Command::new("mount").args(["-t", "tmpfs", "none", folder]))?;
        }
        let up = Command::new(weft).args(["lab", "up"]).stdout(Stdio::null()).status()?;
        ensure!(up.success(), "the lab does not start");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let path = output(Command::new(weft).args(["lab", "kubeconfig"]))?;
        let client = runtime.block_on(async {
            let config = kube::config::Kubeconfig::read_from(path.trim())?;
            let config = kube::Config::from_custom_kubeconfig(config, &Default::default()).await?;
            anyhow::Ok(kube::Client::try_from(config)?)
        })?;
        Ok(Self { weft: weft.to_owned(), client, runtime })
    }

    pub(super) fn on(&self, machine: &str, words: &[&str]) -> anyhow::Result<String> {
        output(Command::new(&self.weft).args(["lab", "exec", machine, "--"]).args(words))
    }

    pub(super) fn apply(&self, yaml: &str) -> anyhow::Result<()> {
        let mut file = tempfile::NamedTempFile::new()?;
        std::io::Write::write_all(&mut file, yaml.as_bytes())?;
        output(Command::new(&self.weft).args(["lab", "apply", "-f"]).arg(file.path())).map(drop)
    }

    /// A pool, a server on every node, and Services of it with the given externalTrafficPolicy.
    pub(super) fn serve(&self, policy: &str) -> anyhow::Result<()> {
        let mut yaml = String::from(
            "apiVersion: metallb.io/v1beta1\nkind: IPAddressPool\nmetadata: {name: lan, namespace: default}\n\
             spec: {addresses: ['172.30.99.150-172.30.99.199', 'fd00:30:99::150-fd00:30:99::199']}\n---\n\
             apiVersion: apps/v1\nkind: DaemonSet\nmetadata: {name: web}\nspec: {selector: {matchLabels: {app: web}}, \
             template: {metadata: {labels: {app: web}}, spec: {containers: [{name: web, image: netexec}]}}}\n",
        );
        for n in 0..SERVICES {
            yaml += &format!(
                "---\napiVersion: v1\nkind: Service\nmetadata: {{name: web{n}}}\nspec: {{type: LoadBalancer, \
                 externalTrafficPolicy: {policy}, ipFamilyPolicy: RequireDualStack, selector: {{app: web}}, \
                 ports: [{{port: 80, targetPort: 8080}}]}}\n"
            );
        }
        self.apply(&yaml)
    }

    /// The addresses of a Service both of which one node answers for, and the node.
    pub(super) fn pair_of_one_node(&self) -> anyhow::Result<([IpAddr; 2], &'static str)> {
        let services: Api<Service> = Api::namespaced(self.client.clone(), "default");
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            for n in 0..SERVICES {
                let service = self.runtime.block_on(services.get(&format!("web{n}")))?;
                let pair = addresses(&service);
                if let [one, other] = pair.as_slice()
                    && let (Ok(first), Ok(second)) = (self.answering(*one), self.answering(*other))
                    && first == second
                {
                    return Ok(([*one, *other], first));
                }
            }
            ensure!(Instant::now() < deadline, "no Service has two addresses at one node");
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    /// The node whose card the client's neighbour table names.
    pub(super) fn answering(&self, address: IpAddr) -> anyhow::Result<&'static str> {
        let address = address.to_string();
        let _ = self.on("client", &["ping", "-c1", "-W1", &address]);
        let neighbour = self.on("client", &["ip", "neigh", "show", &address])?;
        for node in NODES {
            let card = self.on(node, &["cat", "/sys/class/net/eth0/address"])?;
            if neighbour.contains(card.trim()) {
                return Ok(node);
            }
        }
        bail!("nobody answers for {address}: {neighbour}")
    }

    pub(super) fn await_answer(&self, address: IpAddr, node: &str) -> anyhow::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.answering(address).ok() != Some(node) {
            ensure!(Instant::now() < deadline, "{node} does not answer for {address}");
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// The cable of a node, at the switch.
    pub(super) fn cable(&self, node: &str, state: &str) -> anyhow::Result<()> {
        self.on("lan", &["ip", "link", "set", node, state]).map(drop)
    }

    pub(super) fn cordon(&self, node: &str, cordoned: bool) -> anyhow::Result<()> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        let patch = Patch::Merge(json!({"spec": {"unschedulable": cordoned}}));
        self.runtime.block_on(nodes.patch(node, &PatchParams::default(), &patch))?;
        Ok(())
    }
}

fn addresses(service: &Service) -> Vec<IpAddr> {
    let balancer = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = balancer.and_then(|balancer| balancer.ingress.as_ref()).into_iter().flatten();
    ingress.filter_map(|one| one.ip.as_ref()?.parse().ok()).collect()
}

fn output(command: &mut Command) -> anyhow::Result<String> {
    let output = command.stdin(Stdio::null()).output().context("run a command")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {said}");
    Ok(String::from_utf8(output.stdout)?)
}
