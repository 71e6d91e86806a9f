//! HTTP/1.1 request heads, parsed strictly, and the answers that refuse them.
