//! Access token verification: a pure function of token, policy, keys and time.
