# For the tests of a lab that is up: $weft is the binary. Sourced.
passed=0 failed=0
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

check() { # SENTENCE COMMAND...
  local sentence=$1 said
  said=$(mktemp)
  shift
  if "$@" >"$said" 2>&1; then
    passed=$((passed + 1))
    echo "ok      $sentence"
  else
    failed=$((failed + 1))
    echo "FAILED  $sentence"
    sed 's/^/          /' "$said"
  fi
  rm -f "$said"
}

within() { # SECONDS COMMAND...
  local end=$((SECONDS + $1))
  shift
  until "$@"; do [ $SECONDS -lt $end ] || return 1; sleep 0.2; done
}

on() { "$weft" lab exec "$1" -- "${@:2}"; } # MACHINE COMMAND...
in_pod() { "$weft" lab sh "$1" -- "${@:2}"; } # [NAMESPACE/]POD COMMAND...
kubectl_binary=$("$here/tools/build-kubernetes.sh" "" kubectl)/kubectl
kubectl() { KUBECONFIG=$("$weft" lab kubeconfig) "$kubectl_binary" "$@"; }

summary() {
  echo
  echo "$passed passed, $failed failed"
  [ "$failed" = 0 ]
}
