//! Shared ABI and decisions.
#![no_std]
