#!/usr/bin/env bash
# Debian's cloud kernel, QEMU with the libraries it needs, kmod and wireguard-tools: downloaded and unpacked, not installed.
# Prints the folder, which stays in the cache; remove it for a newer kernel.
set -euo pipefail
cache=${WEFT_CACHE:-$HOME/.cache/weft}
if [ ! -d "$cache/qemu" ]; then
  mkdir -p "$cache"
  folder=$(mktemp -d "$cache/qemu.XXXXXX")
  trap 'rm -rf "$folder"' EXIT
  echo "downloading Debian's kernel and QEMU (once, 45 MB) ..." >&2
  [ "$(id -u)" -ne 0 ] || apt-get update -qq >&2
  kernel=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-.*\)/\1/p')
  # What an installation would bring; what this machine has already is used from where it is.
  libraries=$(apt-get -s install --no-install-recommends qemu-system-x86 | sed -n 's/^Inst \([^ ]*\) (.*/\1/p')
  mkdir "$folder/packages"
  (cd "$folder/packages" && printf '%s\n' $kernel $libraries qemu-system-x86 qemu-system-data seabios kmod wireguard-tools |
    sort -u | xargs apt-get download -qq -o APT::Sandbox::User=root) >&2
  for package in "$folder"/packages/*.deb; do dpkg -x "$package" "$folder"; done
  rm -r "$folder/packages"
  (export LD_LIBRARY_PATH=$folder/usr/lib/x86_64-linux-gnu:$folder/lib/x86_64-linux-gnu
    exec -a depmod "$folder/bin/kmod" -b "$folder" "${kernel#linux-image-}")
  chmod 755 "$folder"
  mv -T "$folder" "$cache/qemu"
fi
echo "$cache/qemu"
