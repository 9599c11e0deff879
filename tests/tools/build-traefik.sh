#!/usr/bin/env bash
# Builds Traefik, a peer of the ingress benchmark, from its Go module. Prints the binary's path. Its go.mod replaces modules,
# so `go install` refuses it: it is built as the main module, in a copy.
set -euo pipefail
. "$(dirname "$0")/once.sh"
version=v3.6.12
build() {
  local source
  source=$(cd "$folder" && go mod download -json "github.com/traefik/traefik/v3@$version" | sed -n 's/.*"Dir": "\(.*\)".*/\1/p')
  cp -r --no-preserve=mode "$source" "$folder/traefik"
  (cd "$folder/traefik" && CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o "$folder/binary" ./cmd/traefik)
}
once "traefik-$version" build
