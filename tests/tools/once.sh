# To be sourced by what builds one program from its Go module.

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
