//! Whether this process reads the same clock as the kernel programs.

/// The clocks differ.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "CLOCK_BOOTTIME of this process is {offset_secs} s off: it runs in a time namespace (time_namespaces(7)), whose offset the kernel programs do not have, so no deadline would hold"
)]
pub struct ClockError {
    /// Offset of the time namespace.
    pub offset_secs: i64,
}

/// Checks that `CLOCK_BOOTTIME` has no offset here. The programs use the kernel's own, which knows no time namespaces.
///
/// # Errors
/// It has one.
pub fn check() -> Result<(), ClockError> {
    judge(&std::fs::read_to_string("/proc/self/timens_offsets").unwrap_or_default())
}

/// Lines of a clock's name (or number), seconds, nanoseconds. No file: a kernel without time namespaces.
fn judge(offsets: &str) -> Result<(), ClockError> {
    for line in offsets.lines() {
        let mut fields = line.split_ascii_whitespace();
        let (Some("boottime" | "7"), Some(secs), Some(nanos)) = (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let offset_secs = secs.parse().unwrap_or(i64::MAX);
        if offset_secs != 0 || nanos != "0" {
            return Err(ClockError { offset_secs });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offset_of_the_boot_clock_is_an_error_and_one_of_another_is_not() {
        assert_eq!(judge(""), Ok(()));
        assert_eq!(judge("monotonic           0         0\nboottime            0         0\n"), Ok(()));
        assert_eq!(judge("monotonic          55         0\nboottime            0         0\n"), Ok(()));
        for (offsets, offset_secs) in
            [("boottime -3 0", -3), ("7 86400 0", 86_400), ("boottime 0 1", 0), ("boottime x 0", i64::MAX)]
        {
            assert_eq!(judge(offsets), Err(ClockError { offset_secs }), "{offsets}");
        }
    }
}
