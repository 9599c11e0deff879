# To be sourced by what builds one program from its Go module or crate, or unpacks Debian packages.

# once NAME BUILD: prints the path of NAME in the cache outside the work tree. Where it is not there yet, the function BUILD leaves it
# as $folder/binary.
once() {
  local cache=${WEFT_CACHE:-$HOME/.cache/weft}/bin
  if [ ! -x "$cache/$1" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    echo "building $1 (once, some minutes) ..." >&2
    "$2" >&2
    mkdir -p "$cache"
    mv "$folder/binary" "$cache/$1"
  fi
  echo "$cache/$1"
}

# from_module PACKAGE@VERSION: what `go install` can build.
from_module() {
  GOBIN=$folder/bin CGO_ENABLED=0 go install -trimpath -ldflags '-s -w' "$1"
  mv "$folder"/bin/* "$folder/binary"
}

# from_crate NAME VERSION: what `cargo install` can build.
from_crate() {
  cargo install --quiet --locked --root "$folder" --target-dir "$folder/target" "$1@$2"
  mv "$folder"/bin/* "$folder/binary"
}

# unpacked NAME FILL: prints the folder NAME of the cache. Where it is not there yet, the function FILL puts into $folder what belongs
# there.
unpacked() {
  local cache=${WEFT_CACHE:-$HOME/.cache/weft}
  if [ ! -d "$cache/$1" ]; then
    mkdir -p "$cache"
    folder=$(mktemp -d "$cache/$1.XXXXXX")
    trap 'rm -rf "$folder"' EXIT
    echo "downloading $1 (once) ..." >&2
    [ "$(id -u)" -ne 0 ] || apt-get update -qq >&2
    "$2" >&2
    chmod 755 "$folder"
    mv -T "$folder" "$cache/$1"
  fi
  echo "$cache/$1"
}

# from_packages NAME...: Debian's packages, downloaded and unpacked, not installed.
from_packages() {
  mkdir "$folder/packages"
  (cd "$folder/packages" && apt-get download -qq -o APT::Sandbox::User=root "$@")
  for package in "$folder"/packages/*.deb; do dpkg -x "$package" "$folder"; done
  rm -r "$folder/packages"
}
