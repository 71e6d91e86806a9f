//! Issuer key sets: where they come from, how long they are trusted.
