# Names, addresses and places of the cluster tier, for the scripts beside this file; each of them sources it.
#
#  weft-cluster          a network namespace: the switch (bridge lan0), etcd, API server, controllers; .1
#  weft-cluster-client   a network namespace: a host on the LAN outside the cluster; .250
#  nodeN                 namespaces of their own (network, mounts, pids, UTS, IPC), held by process 1, `node`; .1N
#
# WEFT_CLUSTER names the cluster: under another name a second one may stand beside the first.
#
# shellcheck shell=bash
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
# What lives as long as the cluster is up, and what a node keeps over a power cut.
cluster=${WEFT_CLUSTER:-weft-cluster}
run=/run/$cluster
disk=/var/lib/$cluster
lan=$cluster
client=$cluster-client
nodes=(node1 node2 node3)
v4=172.30.98
v6=fd00:30:98::
api=https://$v4.1:6443
cluster_cidr=10.244.0.0/16,fd00:10:244::/56
service_cidr=10.96.0.0/16,fd00:10:96::/112
cluster_dns=10.96.0.10,fd00:10:96::a
kubernetes_service=10.96.0.1,fd00:10:96::1
export KUBECONFIG=$run/admin.kubeconfig

die() { echo "cluster: $*" >&2; exit 1; }
need_root() { [ "$(id -u)" -eq 0 ] || die "makes namespaces and needs root: use sudo"; }
# Runs a command on the LAN, with the files of this machine.
on_lan() { nsenter --net=/run/netns/$lan -- "$@"; }
kubectl() { on_lan "$run/bin/kubectl" "$@"; }
# The pid of a node's process 1, as this machine numbers it.
node_pid() { cat "$run/$1.pid" 2>/dev/null; }
# Runs a command on a node: every namespace, and the node's cgroup view.
on_node() { local name=$1 pid; shift; pid=$(node_pid "$name"); nsenter -t "$pid" -m -u -i -n -p -- "$@"; }
# ctr of this machine, with its files, on a node's containerd.
runtime() { local name=$1; shift; ctr --address "/proc/$(node_pid "$name")/root/run/containerd/containerd.sock" "$@"; }
# Waits for a command to succeed: within SECONDS WHAT COMMAND...
within() {
  local limit=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $limit ] || { echo "cluster: no $what in time; the last try said:" >&2; "$@" >&2 || true; return 1; }
    sleep 0.2
  done
}
