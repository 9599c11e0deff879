#!/usr/bin/env bash
# Builds Traefik, a peer of the ingress benchmark, from its Go module. Prints the binary's path. Cached outside the work
# tree. Its go.mod replaces modules, so `go install` refuses it: it is built as the main module, in a copy.
set -euo pipefail
version=v3.6.12
cache=${WEFT_CACHE:-$HOME/.cache/weft}/bin
binary=$cache/traefik-$version
if [ ! -x "$binary" ]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  echo "building Traefik $version (once, some minutes) ..." >&2
  source=$(cd "$folder" && go mod download -json "github.com/traefik/traefik/v3@$version" | sed -n 's/.*"Dir": "\(.*\)".*/\1/p')
  cp -r --no-preserve=mode "$source" "$folder/traefik"
  (cd "$folder/traefik" && CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o "$folder/binary" ./cmd/traefik) >&2
  mkdir -p "$cache"
  mv "$folder/binary" "$binary"
fi
echo "$binary"
