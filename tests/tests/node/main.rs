//! One node of real processes under faults, restarts and clean-up. `make debug` builds what is tested.

mod away;
mod cleanup;
mod faults;
mod refusals;
mod restart;
mod rights;
mod store;
