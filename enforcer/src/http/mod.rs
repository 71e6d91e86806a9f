//! HTTP/1.1 request heads, parsed strictly, and the answers that refuse them.
//!
//! [`head`] accepts one spelling of a request and refuses the rest, because every spelling that two parsers can
//! read differently is a way past one of them. [`answer`] writes the refusals, [`metadata`] the protected
//! resource metadata that the refusals point to. Nothing here does I/O.

pub mod answer;
pub mod head;
pub mod metadata;
#[cfg(test)]
pub(crate) mod test_server;
