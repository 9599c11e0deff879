#!/usr/bin/env bash
# Builds wireguard-go, the peer of the overlay's benchmark and interoperability test, from its Go module. Prints the
# binary's path.
set -euo pipefail
. "$(dirname "$0")/once.sh"
version=v0.0.0-20260522210424-ecfc5a8d5446
build() { from_module "golang.zx2c4.com/wireguard@$version"; }
once "wireguard-go-$version" build
