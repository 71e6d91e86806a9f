//! Numbers for response templates.

use std::collections::HashMap;

use enforcer_common::abi::{MAX_REPLIES, REPLY_MAX_BYTES, Reply};

use crate::http::answer::{Answer, template};

use super::Datapath;

/// The templates that the kernel knows. Equal answers share a number; when all are taken, further answers come from the daemon.
#[cfg_attr(test, derive(Clone))]
#[derive(Debug, Default)]
pub struct ReplyTable {
    ids: HashMap<Vec<u8>, u32>,
}

impl ReplyTable {
    /// Takes over the templates that an earlier daemon wrote: those of the numbers 0, 1, ... up to the first that is free. Call it
    /// once, on an empty table.
    pub fn adopt(&mut self, replies: impl IntoIterator<Item = Reply>) {
        let used = replies.into_iter().take_while(|reply| reply.min_bytes != 0);
        for (id, reply) in (0..MAX_REPLIES).zip(used) {
            let bytes = reply.bytes.get(..reply.min_bytes as usize).unwrap_or(&reply.bytes);
            self.ids.insert(bytes.to_vec(), id);
        }
    }

    /// The number of an answer, if the kernel can give it.
    pub fn id<D: Datapath>(&mut self, answer: &Answer, datapath: &mut D) -> Option<u32> {
        let template = template(answer)?;
        if let Some(id) = self.ids.get(&template.bytes) {
            return Some(*id);
        }
        let id = u32::try_from(self.ids.len()).ok().filter(|id| *id < MAX_REPLIES)?;
        let mut bytes = [b' '; REPLY_MAX_BYTES];
        bytes.get_mut(..template.bytes.len())?.copy_from_slice(&template.bytes);
        let reply = Reply {
            min_bytes: u32::try_from(template.min_len).ok()?,
            head_bytes: u32::try_from(template.head_len).ok()?,
            content_length_at: u32::try_from(template.content_length_at).ok()?,
            status: u32::from(answer.status),
            bytes,
        };
        datapath.set_reply(id, &reply).ok()?;
        self.ids.insert(template.bytes, id);
        Some(id)
    }
}
