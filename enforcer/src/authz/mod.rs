//! The decision about one request: a pure function of its head, the policy, the keys and the time.
