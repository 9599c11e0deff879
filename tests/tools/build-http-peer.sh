#!/usr/bin/env bash
# Builds the server of tests/lab/ingress (http-peer/main.go, Go's own net/http and nothing else). Prints the binary's path.
set -euo pipefail
. "$(dirname "$0")/once.sh"
source=$(cd "$(dirname "$0")/http-peer" && pwd)
build() { (cd "$source" && CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o "$folder/binary" .); }
once "http-peer-$(cat "$source"/* | sha256sum | cut -c1-16)" build
