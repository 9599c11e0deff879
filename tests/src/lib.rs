//! What the tests of the whole share: a printer and a packet tracer for rule-set values.

pub mod nft_text;
pub mod trace;
