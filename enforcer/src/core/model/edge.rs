//! The daemon's way into the kernel: the inject program, and the maps.

use std::cell::Cell;
use std::rc::Rc;

use enforcer_common::abi::{
    Bucket, BucketLabel, Ends, FLOW_PIPELINED, FirstUser, Flow, Grant, GrantLabel, Handed, HeadDigest,
    NameHash, Origin, Reply, SourceKey, Verdict,
};
use enforcer_common::flow::{self, Ctl, CtlWord as _};

use super::kernel::{Answer, COOKIE, Fault, Kernel, Queued, Step, Word};
use super::search::Choices;
use crate::core::{CallerFacts, Datapath, GrantBuckets, HandBack, Shape};
use crate::revocation::Revocations;

/// The daemon's way into the kernel. Before each call that matters anything else may happen.
pub(super) struct Edge<'a> {
    pub(super) kernel: &'a mut Kernel,
    pub(super) choices: &'a mut Choices,
}

impl Edge<'_> {
    /// What happens elsewhere while the daemon is on its way to the next call.
    fn meanwhile(&mut self) -> Result<(), &'static str> {
        while !self.kernel.dying {
            let mut steps = self.kernel.enabled();
            if self.kernel.options.deaths && !self.kernel.died {
                steps.push(Step::Die);
            }
            let picked = self.choices.pick(steps.len() + 1);
            let Some(step) = picked.checked_sub(1).map(|index| steps[index]) else { return Ok(()) };
            self.kernel.history.push(step);
            if step == Step::Die {
                self.kernel.dying = true;
            } else {
                self.kernel.step(step);
            }
        }
        Err("killed")
    }

    /// [`Fault::BackFirst`]: bytes that were held back.
    pub(super) fn flush(&mut self) {
        if let Some(bytes) = self.kernel.held.take() {
            self.kernel.queue.push_back(Queued::Server(bytes));
        }
    }

    fn may_inject(&mut self, ctl: Ctl) -> bool {
        let Some(flow) = &mut self.kernel.flow else { return false };
        flow::may_inject(&Word(Cell::from_mut(&mut flow.ctl)), ctl)
    }
}

impl Datapath for Edge<'_> {
    type Error = &'static str;

    fn to_server(&mut self, _: u32, _: u64, ctl: Ctl, _: u64, bytes: &[u8]) -> Result<(), Self::Error> {
        self.meanwhile()?;
        if !self.may_inject(ctl) {
            return Ok(());
        }
        if self.kernel.options.fault == Fault::BackFirst {
            self.kernel.held = Some(bytes.to_vec());
            return Ok(());
        }
        self.kernel.queue.push_back(Queued::Server(bytes.to_vec()));
        Ok(())
    }

    fn to_client(&mut self, _: u64, ctl: Ctl, _: &crate::http::answer::Answer) -> Result<(), Self::Error> {
        self.meanwhile()?;
        if self.may_inject(ctl) {
            self.kernel.queue.push_back(Queued::Client(Answer::Refusal));
        }
        Ok(())
    }

    fn hand_back(&mut self, _: u64, expected: Ctl, to: HandBack) -> Result<(), Self::Error> {
        self.meanwhile()?;
        let fault = self.kernel.options.fault;
        let Some(flow) = &mut self.kernel.flow else { return Ok(()) };
        let Flow { ctl, handed, .. } = flow;
        let word = Word(Cell::from_mut(ctl));
        let expected = if fault == Fault::BytesNotCompared { word.load() } else { expected };
        let _ = flow::hand_back(&word, expected, to.ctl, || {
            *handed = Handed {
                remaining_bytes: to.remaining_bytes,
                chunked: to.chunked,
                grant_serial: to.grant_serial,
                write_seq_mark: to.write_seq_mark,
                flags: if to.pipelined { FLOW_PIPELINED } else { 0 },
            };
        });
        if fault == Fault::BackFirst {
            self.meanwhile()?;
        }
        Ok(())
    }

    fn destroy(&mut self, _: u64, _: u64, after_ns: u64) {
        if self.meanwhile().is_err() {
            return;
        }
        if after_ns == 0 {
            self.kernel.destroy();
        } else {
            self.kernel.destroy_due = true;
        }
    }

    fn destroy_stray(&mut self, _: u64, _: u64, _: u32, _: Ends) {}

    fn revocation_epoch(&mut self) -> Result<u64, Self::Error> {
        Ok(0)
    }

    fn revocations(&mut self) -> Result<Revocations, Self::Error> {
        Ok(Revocations::default())
    }

    fn set_grant_slots(&mut self, _: u32) -> Result<(), Self::Error> {
        Ok(())
    }

    fn flows(&mut self, each: &mut dyn FnMut(u64, &Flow)) -> Result<(), Self::Error> {
        self.kernel.flow.iter().for_each(|flow| each(COOKIE, flow));
        Ok(())
    }

    fn flow_exists(&mut self, _: u64) -> bool {
        self.kernel.flow.is_some()
    }

    fn peer(&mut self, _: u64) -> String {
        String::new()
    }

    fn holder(&mut self, _: &Origin) -> CallerFacts {
        CallerFacts::NOTHING
    }

    fn first_user(&mut self, _: &NameHash) -> Result<Option<FirstUser>, Self::Error> {
        Ok(None)
    }

    fn set_first_user(&mut self, _: &NameHash, _: &FirstUser) -> Result<(), Self::Error> {
        Err("no binding here")
    }

    fn caller(&mut self, _: u64, _: &Origin) -> CallerFacts {
        CallerFacts::NOTHING
    }

    fn set_verdict(&mut self, digest: HeadDigest, verdict: Verdict) -> Result<(), Self::Error> {
        if self.kernel.dying {
            return Err("killed");
        }
        self.kernel.verdicts.insert(digest, verdict);
        Ok(())
    }

    fn grant(&mut self, slot: u32) -> Result<Grant, Self::Error> {
        self.kernel.grants.get(&slot).copied().ok_or("no such slot")
    }

    fn set_grant(&mut self, slot: u32, grant: &Grant) -> Result<(), Self::Error> {
        if self.kernel.dying {
            return Err("killed");
        }
        self.kernel.grants.insert(slot, *grant);
        Ok(())
    }

    fn grant_label(&mut self, _: u32) -> Result<GrantLabel, Self::Error> {
        Err("labels are not kept")
    }

    fn set_grant_label(&mut self, _: u32, _: &GrantLabel) -> Result<(), Self::Error> {
        Ok(())
    }

    fn bucket(&mut self, _index: u32) -> Result<Bucket, Self::Error> {
        Err("no limits here")
    }

    fn begin_bucket(
        &mut self,
        _index: u32,
        _bucket: &Bucket,
        _label: &BucketLabel,
    ) -> Result<(), Self::Error> {
        Err("no limits here")
    }

    fn limit_bucket(&mut self, _index: u32, _shape: &Shape, _now_ns: u64) -> Result<(), Self::Error> {
        Err("no limits here")
    }

    fn end_bucket(&mut self, _index: u32) -> Result<(), Self::Error> {
        Err("no limits here")
    }

    fn give_back_places(&mut self, _index: u32, _places: u64) -> Result<(), Self::Error> {
        Err("no limits here")
    }

    fn charge(&mut self, _cookie: u64, buckets: &GrantBuckets, _now_ns: u64) -> Result<(), u64> {
        if buckets[0] == 0 { Ok(()) } else { Err(u64::MAX) }
    }

    fn charge_source(&mut self, _source: &SourceKey, _now_ns: u64) -> Result<(), u64> {
        Ok(())
    }

    fn set_reply(&mut self, id: u32, reply: &Reply) -> Result<(), Self::Error> {
        self.kernel.replies.insert(id, Rc::new(*reply));
        Ok(())
    }

    fn count(&mut self, _: &'static str) {}
}
