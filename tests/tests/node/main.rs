//! One node of real processes under faults, restarts and clean-up. `make debug` builds what is tested.

mod api_away;
mod cleanup;
mod cni;
mod faults;
mod objects;
mod refusals;
mod restart;
mod rights;
mod store;
mod uplink;
