#!/usr/bin/env bash
# Builds parts of Kubernetes from their Go modules, once, outside the work tree, and prints the folder of the binaries.
# Usage: build-kubernetes.sh [MINOR [NAME...]]    a minor version is a folder beside this script (default: the newest);
#        NAME is one of the keys below (default: what a cluster needs).
# In: WEFT_CACHE (default ~/.cache/weft), go on the PATH (or in /usr/local/go/bin).
#
# k8s.io/kubernetes cannot be a main module, because its module leaves out the staging repositories that it replaces:
# kubernetes/MINOR/go.mod replaces them by their releases, with the requirements of kubernetes' own go.mod.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
PATH=$PATH:/usr/local/go/bin

declare -A package=(
  [etcd]=go.etcd.io/etcd/server/v3
  [kube-apiserver]=k8s.io/kubernetes/cmd/kube-apiserver
  [kube-controller-manager]=k8s.io/kubernetes/cmd/kube-controller-manager
  [kube-scheduler]=k8s.io/kubernetes/cmd/kube-scheduler
  [kubelet]=k8s.io/kubernetes/cmd/kubelet
  [kubectl]=k8s.io/kubernetes/cmd/kubectl
  [kube-proxy]=k8s.io/kubernetes/cmd/kube-proxy
  [agnhost]=k8s.io/kubernetes/test/images/agnhost
)
# An empty MINOR is the default too.
minor=${1:-$(cd "$here/kubernetes" && printf '%s\n' [0-9]* | sort -V | tail -n 1)}
shift || true
[ $# -gt 0 ] || set -- etcd kube-apiserver kube-controller-manager kube-scheduler kubelet kubectl agnhost
module=$here/kubernetes/$minor
if [ ! -d "$module" ]; then
  echo "no Kubernetes $minor here; there are $(cd "$here/kubernetes" && printf '%s ' *)" >&2
  exit 2
fi

version=$(sed -n 's/^require k8s.io\/kubernetes \(v[0-9.]*\).*/\1/p' "$module/go.mod")
folder=${WEFT_CACHE:-$HOME/.cache/weft}/bin/kubernetes-$version
mkdir -p "$folder"
# The version that the binaries report is set as the project's own release build sets it: kubelet and API server compare.
flags="-s -w"
for place in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
  flags="$flags -X $place.gitVersion=$version -X $place.gitTreeState=clean"
  flags="$flags -X $place.gitMajor=1 -X $place.gitMinor=${minor#1.}"
done
for name in "$@"; do
  [ ! -x "$folder/$name" ] || continue
  echo "building $name of Kubernetes $version (once, some minutes) ..." >&2
  temporary=$folder/.$name.$$
  trap 'rm -f "$temporary"' EXIT
  (cd "$module" && CGO_ENABLED=0 nice -n 10 go build -trimpath -mod=readonly -ldflags "$flags" -o "$temporary" "${package[$name]}") >&2
  mv "$temporary" "$folder/$name"
done
echo "$folder"
