# The commands of README.md. Each installs what it needs from Debian's packages (scripts/need).
.PHONY: build debug image lab cluster cluster-down kernel-wireguard test check bench clean

HOST := $(shell rustc -vV | sed -n 's/^host: //p')
WEFT := target/$(HOST)/release/weft

build:
	@scripts/need cc
	scripts/build $(HOST)

debug:
	cargo build --locked -p weft

lab: build
	@scripts/need lab
	$(WEFT) lab up
	$(WEFT) lab tour

# What the DaemonSet of `weft manifests` runs, for a registry or `ctr -n k8s.io image import`.
image: build
	scripts/image-of-weft $(WEFT) target/weft-image.tar
	@echo target/weft-image.tar

cluster: build
	@scripts/need cluster
	tests/cluster/up $(WEFT)
	@echo "try: tests/cluster/kubectl get pods -A -o wide; tests/cluster/exec node1 weft status; make cluster-down"

cluster-down:
	tests/cluster/down

# Debian's kernel with its WireGuard in an emulated machine; some minutes, no KVM.
kernel-wireguard: build
	@scripts/need kernel
	tests/kernel-wireguard/run $(WEFT)

test: debug build
	@scripts/need test
	scripts/test $(WEFT)

check:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	scripts/dependency-policy

bench: build
	@scripts/need bench
	scripts/bench $(WEFT) $(ONLY)

clean:
	cargo clean
