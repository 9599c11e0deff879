//! What the tests of the whole share: a packet tracer for rule-set values, and one node of real processes.

pub mod node;
pub mod trace;
