//! What the tests of the whole share: a packet tracer for rule-set values.

pub mod trace;
