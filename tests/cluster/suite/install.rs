//! Install, upgrade and uninstall, as a user does them.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};

use crate::cluster::{Cluster, NODES, PATIENCE, said};
use crate::load::Load;
use crate::{Case, case};

pub(crate) const CASES: &[Case] = &[
    case("installed again nothing is written and nothing restarts", again),
    case("an upgrade to another build and back: established connections go on", upgrade),
    case("installed by hand with a token bound to the node, without the DaemonSet", by_hand),
    case("uninstalled, a node is as it is after a fresh boot, and installed again all is back", uninstall),
];

fn pids(cluster: &Cluster, node: &str) -> anyhow::Result<String> {
    cluster.on(node, "cat /run/node/units/weft-agent.service.pid /run/node/units/weft-tunnel.service.pid")
}

fn installer(cluster: &Cluster, node: &str) -> anyhow::Result<String> {
    let on_node = format!("spec.nodeName={node}");
    let said =
        cluster.kubectl(&["-n", "weft-system", "get", "pods", "-o", "name", "--field-selector", &on_node])?;
    ensure!(said.lines().count() == 1, "installers on {node}: {said:?}");
    Ok(said.trim().to_owned())
}

fn rolled_out(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.kubectl(&["-n", "weft-system", "rollout", "status", "daemonset/weft", "--timeout=180s"])?;
    cluster.nodes_ready()
}

fn again(cluster: &Cluster) -> anyhow::Result<()> {
    let before = pids(cluster, "node2")?;
    let files =
        "find /etc/systemd/system/weft* /etc/weft /usr/local/bin/weft -type f -printf '%p %T@\\n' | sort";
    let written = cluster.on("node2", files)?;
    let old = installer(cluster, "node2")?;
    cluster.kubectl(&["-n", "weft-system", "delete", &old])?;
    rolled_out(cluster)?;
    ensure!(installer(cluster, "node2")? != old, "the same installer");
    let after = pids(cluster, "node2")?;
    ensure!(before == after, "restarted: {before} {after}");
    let written_after = cluster.on("node2", files)?;
    ensure!(written == written_after, "written again:\n{written}\n{written_after}");
    Ok(())
}

/// What the DaemonSet runs.
pub(crate) fn image(cluster: &Cluster) -> anyhow::Result<String> {
    let daemonset = cluster.object(&["-n", "weft-system", "daemonset", "weft"])?;
    let image = &daemonset["spec"]["template"]["spec"]["containers"][0]["image"];
    Ok(image.as_str().context("an image")?.to_owned())
}

/// What the agent of a node is, as a digest.
fn running(cluster: &Cluster, node: &str) -> anyhow::Result<String> {
    cluster.on(node, "sha256sum < /proc/$(cat /run/node/units/weft-agent.service.pid)/exe")
}

/// To the image of another build: that under the tag `other` was put on every node by `tests/cluster/other-build`.
pub(crate) fn change_image(cluster: &Cluster, image: &str) -> anyhow::Result<()> {
    let before = NODES.iter().map(|node| running(cluster, node)).collect::<anyhow::Result<Vec<_>>>()?;
    let assignment = format!("*={image}");
    cluster.kubectl(&["-n", "weft-system", "set", "image", "daemonset/weft", &assignment])?;
    rolled_out(cluster)?;
    // An installer is ready when the agent is, which may still be the one before.
    for (node, before) in NODES.iter().zip(&before) {
        cluster.within(Duration::from_secs(30), "the other build runs", || {
            ensure!(running(cluster, node)? != *before, "{node} runs {before} under image {image}");
            Ok(())
        })?;
    }
    cluster.nodes_ready()
}

fn upgrade(cluster: &Cluster) -> anyhow::Result<()> {
    let first = image(cluster)?;
    let running = |node: &str| running(cluster, node);
    let loads = [
        Load::on_established_connections(cluster, "node1", "steady")?,
        Load::on_established_connections(cluster, "node3", "steady")?,
        Load::on_new_connections_by_address(cluster, "node3", "steady")?,
    ];
    let before = NODES.map(running).into_iter().collect::<anyhow::Result<Vec<_>>>()?;
    for image in ["weft:other", &first] {
        change_image(cluster, image)?;
        for (node, before) in NODES.iter().zip(&before) {
            let now = running(node)?;
            ensure!((now == *before) == (image == first), "{node} runs {now} under image {image}");
        }
        loads.iter().try_for_each(|load| load.unharmed(&format!("after the change to {image}")))?;
    }
    Ok(())
}

/// Ends the DaemonSet, which would bring Weft back to a node.
fn without_daemonset(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.kubectl(&["-n", "weft-system", "delete", "daemonset", "weft", "--wait=true"])?;
    cluster.within(PATIENCE, "the installers ended", || {
        let left = cluster.kubectl(&["-n", "weft-system", "get", "pods", "-o", "name"])?;
        ensure!(left.trim().is_empty(), "{left}");
        Ok(())
    })
}

/// `docs/operations.md`, "By hand", to the letter but for the ranges.
fn by_hand(cluster: &Cluster) -> anyhow::Result<()> {
    const FLAGS: &str = "--cluster-cidr 10.244.0.0/16,fd00:10:244::/56 --service-cidr 10.96.0.0/16,fd00:10:96::/112 \
                         --cluster-dns 10.96.0.10,fd00:10:96::a";
    without_daemonset(cluster)?;
    cluster.on("node3", "weft uninstall")?;
    let binary = cluster.run_folder.join("weft");
    let manifests = said(Command::new(&binary).args(["manifests", "--no-daemonset"]).args(FLAGS.split(' ')))?;
    let file = cluster.run_folder.join("by-hand.yaml");
    std::fs::write(&file, manifests)?;
    said(cluster.script("kubectl").args(["apply", "-f"]).arg(&file))?;
    let of_system = |words: &[&str]| cluster.kubectl(&[&["-n", "weft-system"], words].concat());
    let ca = of_system(&["get", "configmap", "kube-root-ca.crt", "-o", r"jsonpath={.data.ca\.crt}"])?;
    let bound = ["create", "token", "weft-agent", "--bound-object-kind=Node", "--bound-object-name=node3"];
    let token = of_system(&bound)?;
    let pid = std::fs::read_to_string(cluster.run_folder.join("node3.pid"))?;
    let node = |path: &str| format!("/proc/{}/root{path}", pid.trim());
    std::fs::create_dir_all(node("/etc/weft"))?;
    std::fs::write(node("/etc/weft/ca.crt"), ca)?;
    std::fs::write(node("/etc/weft/token"), token)?;
    std::fs::copy(&binary, node("/tmp/weft"))?;
    let credentials = "--token-file /etc/weft/token --ca-file /etc/weft/ca.crt";
    let printed = cluster.on("node3", &format!("/tmp/weft install {credentials} {FLAGS}"))?;
    ensure!(printed.lines().last().is_some_and(|line| line.starts_with("ready")), "{printed}");
    cluster.nodes_ready()?;
    pods_anew(cluster)?;
    // Files that a person put there are theirs to remove.
    cluster.on("node3", "weft uninstall && rm -r /etc/weft")?;
    said(cluster.script("install-weft").arg(&binary))?;
    cluster.nodes_ready()?;
    pods_anew(cluster)
}

/// The pods of node3 lost their links with the uninstallation.
fn pods_anew(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.kubectl(&["delete", "pods", "--field-selector", "spec.nodeName=node3", "--grace-period=1"])?;
    cluster.within(PATIENCE, "a pod of the node", || {
        let client = cluster.pod_on("tools", "node3")?;
        let said = cluster.in_pod(&client.name, "curl -sS -m 3 http://steady/hostname")?;
        ensure!(said.trim() == "steady", "{said}");
        Ok(())
    })
}

/// What of the kernel and the disk Weft may touch, a line each; what no two boots share is left out.
fn picture(cluster: &Cluster, node: &str) -> anyhow::Result<String> {
    cluster.on(
        node,
        "nft -s list ruleset
         ip -o link | sed 's/^[0-9]*: //; s/@if[0-9]*//; s/ link-netnsid.*//; s#link/ether [0-9a-f:]*#link/ether#'
         ip -o address | sed 's/^[0-9]*: //; s/fe80::[0-9a-f:]*/fe80::/'
         for family in -4 -6; do ip $family rule; ip $family route show table all | sed 's/fe80::[0-9a-f:]*/fe80::/' | sort; done
         sysctl -a --pattern '^net[.]' 2>/dev/null | grep -v 'conntrack_count\\|conntrack_max\\|_secret\\|/mnt'
         find /etc /opt /usr/local /var/lib/weft /run/weft -path /etc/ssl -prune -o -printf '%p\\n' 2>/dev/null | sort",
    )
}

fn uninstall(cluster: &Cluster) -> anyhow::Result<()> {
    without_daemonset(cluster)?;
    for node in NODES {
        let printed = cluster.on(node, "weft uninstall")?;
        ensure!(printed.contains("nothing of Weft is left"), "{node}: {printed}");
    }
    // The pods' ends of the links went with ours; the node itself must be as a boot leaves it.
    let after_uninstall = picture(cluster, "node3")?;
    cluster.power("cycle", "node3")?;
    cluster.within(PATIENCE, "the node's services run", || {
        cluster.on("node3", "systemctl is-active containerd kubelet")
    })?;
    let after_boot = cluster.within(Duration::from_secs(20), "the same picture", || {
        let after_boot = picture(cluster, "node3")?;
        let differences = differences(&after_uninstall, &after_boot);
        ensure!(differences.is_empty(), "{}", differences.join("; "));
        Ok(after_boot)
    })?;
    ensure!(!after_boot.contains("weft"), "a name of ours: {after_boot}");
    cluster.within(PATIENCE, "nodes are NotReady without a network", || {
        let conditions = cluster.kubectl(&["get", "nodes"])?;
        ensure!(conditions.matches("NotReady").count() == 3, "{conditions}");
        Ok(())
    })?;
    said(cluster.script("install-weft").arg(cluster.run_folder.join("weft")))?;
    cluster.nodes_ready()?;
    // Pods from before have no network any more: they are made anew, as after any change of network.
    cluster.kubectl(&["delete", "pods", "--all", "--grace-period=1"])?;
    Cluster::prepare()?;
    for node in NODES {
        let client = cluster.pod_on("tools", node)?;
        let answer = cluster.in_pod(&client.name, "curl -sS -m 5 http://echo/hostname")?;
        ensure!(answer.starts_with("echo-"), "{node}: {answer}");
    }
    Ok(())
}

fn differences<'a>(before: &'a str, after: &'a str) -> Vec<String> {
    let only_in = |a: &'a str, b: &'a str| {
        let of_b: std::collections::HashSet<_> = b.lines().collect();
        a.lines().filter(move |line| !of_b.contains(line)).collect::<Vec<_>>()
    };
    let left = only_in(before, after).into_iter().map(|line| format!("left behind: {line}"));
    let missing = only_in(after, before).into_iter().map(|line| format!("missing: {line}"));
    left.chain(missing).collect()
}
