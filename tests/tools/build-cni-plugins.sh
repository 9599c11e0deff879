#!/usr/bin/env bash
# Builds the reference CNI plugins (the chain that flannel's plugin delegates to), the peer of the CNI benchmark, from their Go
# module. Prints the folder's path. Cached outside the work tree.
set -euo pipefail
version=v1.10.0
folder=${WEFT_CACHE:-$HOME/.cache/weft}/bin/cni-plugins-$version
if [ ! -d "$folder" ]; then
  making=$(mktemp -d)
  trap 'rm -rf "$making"' EXIT
  module=github.com/containernetworking/plugins
  for plugin in main/bridge ipam/host-local meta/portmap meta/bandwidth main/loopback; do
    GOBIN=$making CGO_ENABLED=0 go install -trimpath -ldflags '-s -w' "$module/plugins/$plugin@$version" >&2
  done
  mkdir -p "$(dirname "$folder")"
  mv "$making" "$folder"
  trap - EXIT
fi
echo "$folder"
