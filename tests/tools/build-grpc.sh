#!/usr/bin/env bash
# Builds the client and the server that implementations of gRPC are tried against one another with, from their Go module. Prints the
# path of one: build-grpc.sh client|server
set -euo pipefail
. "$(dirname "$0")/once.sh"
version=v1.85.0
build() { from_module "google.golang.org/grpc/interop/$kind@$version"; }
kind=$1
once "grpc-interop-$kind-$version" build
