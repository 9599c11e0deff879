#!/usr/bin/env bash
# Builds CoreDNS, the peer of the DNS benchmark, from its Go module. Prints the binary's path.
set -euo pipefail
. "$(dirname "$0")/once.sh"
version=v1.15.0
build() { from_module "github.com/coredns/coredns@$version"; }
once "coredns-$version" build
