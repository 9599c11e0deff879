#!/usr/bin/env bash
# Debian's systemd-resolved with its library, unpacked: an installation would change how this machine resolves names. Prints the folder,
# which stays in the cache; remove it for a newer one.
set -euo pipefail
. "$(dirname "$0")/once.sh"
fill() { from_packages systemd-resolved libsystemd-shared; }
unpacked systemd-resolved fill
