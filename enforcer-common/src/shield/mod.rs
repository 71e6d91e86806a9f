//! The shield's decisions: what a packet is ([`walk`]), whether it passes ([`verdict`]), what becomes of its TCP options ([`options`]), and
//! when a source is quarantined ([`quarantine`]).

pub mod options;
pub mod quarantine;
pub mod verdict;
pub mod walk;
