#!/usr/bin/env bash
# Debian's systemd-resolved with its library: downloaded and unpacked, not installed, which would change how this machine resolves names.
# Prints the folder, which stays in the cache; remove it for a newer one.
set -euo pipefail
cache=${WEFT_CACHE:-$HOME/.cache/weft}
if [ ! -d "$cache/systemd-resolved" ]; then
  mkdir -p "$cache"
  folder=$(mktemp -d "$cache/systemd-resolved.XXXXXX")
  trap 'rm -rf "$folder"' EXIT
  echo "downloading Debian's systemd-resolved (once, 2 MB) ..." >&2
  [ "$(id -u)" -ne 0 ] || apt-get update -qq >&2
  (cd "$folder" && apt-get download -qq -o APT::Sandbox::User=root systemd-resolved libsystemd-shared) >&2
  for package in "$folder"/*.deb; do dpkg -x "$package" "$folder"; done
  rm "$folder"/*.deb
  chmod 755 "$folder"
  mv -T "$folder" "$cache/systemd-resolved"
fi
echo "$cache/systemd-resolved"
