#!/usr/bin/env bash
# Debian's cloud kernel, QEMU with the libraries it needs, kmod and wireguard-tools (45 MB), unpacked. Prints the folder, which stays in
# the cache; remove it for a newer kernel.
set -euo pipefail
. "$(dirname "$0")/once.sh"
fill() {
  kernel=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-.*\)/\1/p')
  # What an installation would bring; what this machine has already is used from where it is.
  libraries=$(apt-get -s install --no-install-recommends qemu-system-x86 | sed -n 's/^Inst \([^ ]*\) (.*/\1/p')
  from_packages $(printf '%s\n' $kernel $libraries qemu-system-x86 qemu-system-data seabios kmod wireguard-tools | sort -u)
  (export LD_LIBRARY_PATH=$folder/usr/lib/x86_64-linux-gnu:$folder/lib/x86_64-linux-gnu
    exec -a depmod "$folder/bin/kmod" -b "$folder" "${kernel#linux-image-}")
}
unpacked qemu fill
