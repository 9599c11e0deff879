//! What the tests of the whole share: a printer and a packet tracer for rule-set values, and one node of real processes.

pub mod nft_text;
pub mod node;
pub mod trace;
