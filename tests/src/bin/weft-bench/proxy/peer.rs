//! kube-proxy, built from its Go module, on the node of the rig in place of Weft's proxy.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, ensure};

use crate::rig::{CIDRS, NODE, Peer, Rig};

/// Of the version that the cluster tier runs; the folder that it is in.
pub(crate) const KUBE_PROXY: Peer = Peer { script: "build-kubernetes.sh", args: &["", "kube-proxy"] };

/// Where it tells its metrics.
pub(super) const METRICS: &str = "127.0.0.1:10249";

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    Nftables,
    Iptables,
}

impl Mode {
    fn word(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Nftables => "kube-proxy nftables",
            Self::Iptables => "kube-proxy iptables",
        }
    }
}

pub(super) struct KubeProxy {
    child: Child,
    program: PathBuf,
    config: PathBuf,
}

impl Drop for KubeProxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl KubeProxy {
    pub(super) fn start(program: &Path, rig: &Rig, mode: Mode) -> anyhow::Result<Self> {
        let folder = rig.folder.path();
        let config = folder.join("kube-proxy.yaml");
        let text = format!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\n\
             kind: KubeProxyConfiguration\n\
             mode: {}\n\
             hostnameOverride: {NODE}\n\
             clusterCIDR: {}\n\
             clientConnection: {{kubeconfig: {}, contentType: application/json, acceptContentTypes: application/json}}\n\
             healthzBindAddress: 127.0.0.1:10300\n\
             metricsBindAddress: {METRICS}\n\
             conntrack: {{maxPerCore: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}}\n",
            mode.word(),
            CIDRS[1],
            folder.join("kubeconfig").display()
        );
        std::fs::write(&config, text)?;
        let log = std::fs::File::create(folder.join("kube-proxy.log"))?;
        let child = Command::new(program)
            .arg("--config")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("start kube-proxy")?;
        Ok(Self { child, program: program.to_owned(), config })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Stops it and lets it take its rules away.
    pub(super) fn end(mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        let cleaned = Command::new(&self.program)
            .arg("--cleanup")
            .arg("--config")
            .arg(&self.config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        ensure!(cleaned.success(), "kube-proxy --cleanup: {cleaned}");
        Ok(())
    }
}
