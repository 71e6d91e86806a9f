//! MPTCP's option in a SYN becomes NOPs: the server sees a plain TCP client, and answers as to one, so the client falls back at once.

/// Room for the longest options: TCP's header has 60 bytes at most, 20 of them fixed. A power of two, for the verifier.
pub const OPTION_BYTES: usize = 64;
/// The most steps that [`Options::step`] needs.
pub const MAX_STEPS: u32 = 40;

const END: u8 = 0;
const NO_OPERATION: u8 = 1;
const MPTCP: u8 = 30;

/// The options of one SYN. The program keeps them in a map, where the verifier knows nothing of their values and has one step to look at.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// The bytes, of which `len` count.
    pub bytes: [u8; OPTION_BYTES],
    /// How many there are.
    pub len: u32,
    /// Where the next option begins.
    pub at: u32,
    /// Bytes of MPTCP's option that are left at `at`.
    pub left: u32,
    /// How many bytes became NOPs.
    pub removed: u32,
    /// Sum of what they were, as the checksum adds them: see [`update_checksum`].
    pub old: u32,
    /// Sum of what they became.
    pub new: u32,
}

impl Options {
    /// None.
    pub const NONE: Self =
        Self { bytes: [0; OPTION_BYTES], len: 0, at: 0, left: 0, removed: 0, old: 0, new: 0 };

    /// Begins with other bytes, of which `len` will count.
    #[inline(always)]
    pub const fn begin(&mut self, len: u32) {
        self.len = len;
        self.at = 0;
        self.left = 0;
        self.removed = 0;
        self.old = 0;
        self.new = 0;
    }

    /// Goes one option on, or one byte within MPTCP's. False: that was all, or what follows is no option; TCP reads no further either.
    #[inline(always)]
    pub fn step(&mut self) -> bool {
        const MASK: usize = OPTION_BYTES - 1;
        let at = self.at as usize;
        if self.at >= self.len || at >= OPTION_BYTES {
            return false;
        }
        if self.left == 0 {
            let kind = self.bytes[at & MASK];
            if kind == END {
                return false;
            }
            if kind == NO_OPERATION {
                self.at += 1;
                return true;
            }
            if self.at + 1 >= self.len {
                return false;
            }
            let length = u32::from(self.bytes[(at + 1) & MASK]);
            if length < 2 || self.at + length > self.len {
                return false;
            }
            if kind != MPTCP {
                self.at += length;
                return true;
            }
            self.left = length;
        }
        // Options begin at an even offset: the first of two bytes is the upper one.
        let shift = if self.at & 1 == 0 { 8 } else { 0 };
        self.old += u32::from(self.bytes[at & MASK]) << shift;
        self.new += u32::from(NO_OPERATION) << shift;
        self.bytes[at & MASK] = NO_OPERATION;
        self.left -= 1;
        self.removed += 1;
        self.at += 1;
        true
    }
}

/// The checksum after 16-bit words that summed up to `old` became words that sum up to `new`: RFC 1624, equation 3.
#[must_use]
#[inline(always)]
pub const fn update_checksum(checksum: u16, old: u32, new: u32) -> u16 {
    !fold(!checksum as u32 + !fold(old) as u32 + fold(new) as u32)
}

#[inline(always)]
const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn strip(options: &[u8]) -> Options {
        let mut state = Options::NONE;
        state.bytes[..options.len()].copy_from_slice(options);
        state.len = options.len() as u32;
        for _ in 0..MAX_STEPS {
            if !state.step() {
                break;
            }
        }
        state
    }

    /// RFC 1071 over bytes whose checksum field is zero.
    fn checksum(bytes: &[u8]) -> u16 {
        let sum: u32 =
            bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
        !fold(sum)
    }

    #[test]
    fn only_mptcp_becomes_nops() {
        let (mss, sack, scale) = ([2, 4, 5, 180], [4, 2], [3, 3, 7]);
        let capable = [30, 4, 1, 0];
        let syn = [&mss[..], &sack, &capable, &[1], &scale].concat();
        let state = strip(&syn);
        assert_eq!(state.removed, 4);
        assert_eq!(state.bytes[..syn.len()], [&mss[..], &sack, &[1; 4], &[1], &scale].concat());
        let join = [&[30, 12][..], &[9; 10]].concat();
        assert_eq!(strip(&[&join[..], &mss].concat()).removed, 12);
        assert_eq!(strip(&[&mss[..], &sack].concat()).removed, 0);
        assert_eq!(strip(&[0, 30, 4, 0, 0]).removed, 0, "behind the end");
        assert_eq!(strip(&[5, 0, 30, 4, 0, 0]).removed, 0, "behind nonsense");
        assert_eq!(strip(&[30, 12, 1, 1]).removed, 0, "longer than there is room");
        assert_eq!(strip(&[30]).removed, 0);
        // As many steps as there are bytes suffice.
        let longest = [&[30, 20][..], &[7; 18], &[30, 20], &[7; 18]].concat();
        let mut state = Options::NONE;
        state.bytes[..40].copy_from_slice(&longest);
        state.len = 40;
        let steps = (0..).take_while(|_| state.step()).count();
        assert_eq!((state.removed, steps), (40, 40));
    }

    proptest! {
        #[test]
        fn nothing_but_mptcp_changes_and_the_checksum_stays_right(
            header in proptest::collection::vec(any::<u8>(), 20),
            words in 0_usize..=10, options in proptest::collection::vec(any::<u8>(), 40), at in 0_usize..36, length in 2_u8..14
        ) {
            let mut segment = header;
            segment[16] = 0;
            segment[17] = 0;
            segment.extend_from_slice(&options[..words * 4]);
            if at + 1 < words * 4 {
                segment[20 + at] = 30;
                segment[21 + at] = length;
            }
            let before = checksum(&segment);
            let mut state = Options::NONE;
            state.bytes[..words * 4].copy_from_slice(&segment[20..]);
            state.len = words as u32 * 4;
            while state.step() {}
            let updated = update_checksum(before, state.old, state.new);
            let changed = segment[20..].iter().zip(&state.bytes).filter(|(a, b)| a != b).count();
            prop_assert!(changed as u32 <= state.removed);
            segment[20..].copy_from_slice(&state.bytes[..words * 4]);
            let after = checksum(&segment);
            // There are two zeros.
            prop_assert!(updated == after || (updated.is_multiple_of(0xffff) && after.is_multiple_of(0xffff)), "{updated:x} {after:x}");
        }
    }
}
