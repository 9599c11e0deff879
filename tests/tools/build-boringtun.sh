#!/usr/bin/env bash
# Builds boringtun-cli, a peer of the overlay's benchmark and interoperability test, from its crate. Prints the binary's path.
set -euo pipefail
. "$(dirname "$0")/once.sh"
version=0.7.1
build() { from_crate boringtun-cli "$version"; }
once "boringtun-cli-$version" build
