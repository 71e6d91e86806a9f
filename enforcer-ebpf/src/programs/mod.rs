//! One file per hook.

pub(crate) mod gate;
pub(crate) mod inject;
pub(crate) mod judge;
pub(crate) mod punt;
pub(crate) mod recognise;
pub(crate) mod sock_ops;
