#!/usr/bin/env bash
# Builds CoreDNS, the peer of the DNS benchmark, from its Go module. Prints the binary's path. Cached outside the work
# tree.
set -euo pipefail
version=v1.15.0
cache=${WEFT_CACHE:-$HOME/.cache/weft}/bin
binary=$cache/coredns-$version
if [ ! -x "$binary" ]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  echo "building CoreDNS $version (once, some minutes) ..." >&2
  GOBIN=$folder CGO_ENABLED=0 go install -trimpath -ldflags '-s -w' "github.com/coredns/coredns@$version" >&2
  mkdir -p "$cache"
  mv "$folder/coredns" "$binary"
fi
echo "$binary"
