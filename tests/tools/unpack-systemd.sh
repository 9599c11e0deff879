#!/usr/bin/env bash
# Debian's systemd-resolved and systemd-networkd with their libraries and a message bus, unpacked: an installation would change how this
# machine resolves names. Prints the folder, which stays in the cache; remove it for newer ones.
set -euo pipefail
. "$(dirname "$0")/once.sh"
fill() { from_packages systemd systemd-resolved libsystemd-shared dbus-daemon libdbus-1-3 libapparmor1 libexpat1 libip4tc2 \
  libkmod2 libseccomp2 libcap-ng0; }
unpacked systemd fill
