#!/bin/sh
# Builds a current kubectl from its Go module, once, outside the work tree, and prints the path of the binary.
# In: WEFT_CACHE (default ~/.cache/weft), go on the PATH (or in /usr/local/go/bin). Out: one line on stdout.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
PATH="$PATH:/usr/local/go/bin"
version=$(sed -n 's/^[[:space:]]*k8s.io\/kubectl \(v[0-9.]*\)$/\1/p' "$here/kubectl/go.mod")
binary="${WEFT_CACHE:-$HOME/.cache/weft}/bin/kubectl-$version"
if [ ! -x "$binary" ]; then
    mkdir -p "$(dirname "$binary")"
    temporary="$binary.$$"
    trap 'rm -f "$temporary"' EXIT
    echo "building kubectl $version (once, some minutes) ..." >&2
    # The version the binary reports is set as the project's own release build sets it.
    minor=$(echo "$version" | cut -d. -f2)
    patch=$(echo "$version" | cut -d. -f3)
    flags="-s -w -X k8s.io/component-base/version.gitVersion=v1.$minor.$patch"
    flags="$flags -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=$minor"
    (cd "$here/kubectl" && CGO_ENABLED=0 nice -n 10 go build -trimpath -mod=readonly -ldflags "$flags" -o "$temporary" .) >&2
    mv "$temporary" "$binary"
fi
echo "$binary"
