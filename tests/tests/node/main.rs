//! One node of real processes under faults, restarts and clean-up. `make debug` builds what is tested.
#![allow(clippy::unwrap_used, reason = "tests may fail by panic")]

mod api_away;
mod balancer;
mod cleanup;
mod cni;
mod custom_dns;
mod events;
mod faults;
mod ingress;
mod kills;
mod lease;
mod networkd;
mod not_ready;
mod objects;
mod policy;
mod refusals;
mod resolved;
mod restart;
mod rights;
mod soak;
mod store;
mod systemd;
mod take_over;
mod uplink;
