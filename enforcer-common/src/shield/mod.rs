//! The shield's decisions: what a packet is ([`walk`]), whether it passes ([`verdict`]), what becomes of its TCP options ([`options`]),
//! who is one source ([`source`]), and when it is quarantined ([`quarantine`]).

pub mod options;
pub mod quarantine;
pub mod source;
pub mod verdict;
pub mod walk;
