#!/usr/bin/env bash
# Builds wireguard-go, the peer of the overlay's benchmark and interoperability test, from its Go module. Prints the
# binary's path. Cached outside the work tree.
set -euo pipefail
cache=${WEFT_CACHE:-$HOME/.cache/weft}/bin
binary=$cache/wireguard-go
if [ ! -x "$binary" ]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  GOBIN=$folder CGO_ENABLED=0 go install -trimpath -ldflags '-s -w' golang.zx2c4.com/wireguard@v0.0.0-20260522210424-ecfc5a8d5446 >&2
  mkdir -p "$cache"
  mv "$folder/wireguard" "$binary"
fi
echo "$binary"
