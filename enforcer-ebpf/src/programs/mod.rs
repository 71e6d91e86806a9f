//! One file per hook, and the parts that they are made of.

pub(crate) mod caller;
pub(crate) mod charge;
pub(crate) mod chunked;
pub(crate) mod connect;
pub(crate) mod failing;
pub(crate) mod gate;
pub(crate) mod hold;
pub(crate) mod inject;
pub(crate) mod judge;
pub(crate) mod punt;
pub(crate) mod recognise;
pub(crate) mod shield;
pub(crate) mod sock_ops;
pub(crate) mod weigh;

use enforcer_common::abi::Flow;
use enforcer_common::flow;

/// [`flow::use_grant`] on a flow's record. A global function to the verifier: its callers' paths don't multiply with its own.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn use_grant(flow: *mut Flow, serial: u64) -> u64 {
    if flow.is_null() {
        return 0;
    }
    // SAFETY: the callers' pointer is a valid map value; the verifier checks each access against the type's size. While a flow
    // is the kernel's only its judge comes here, while it is the daemon's only inject.
    let flow = unsafe { &mut *flow };
    flow::use_grant(&mut flow.grants, &mut flow.evicted_grants, serial);
    0
}
