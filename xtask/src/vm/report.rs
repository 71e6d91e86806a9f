//! The results as a table, for the terminal and for `docs/kernels.md`.

use std::fmt::Write as _;

use super::plan::{Reading, TESTS};

/// One guest's result.
#[derive(Debug)]
pub(super) struct Row {
    /// What was wanted, e.g. `6.12`.
    pub(super) series: &'static str,
    /// What was booted; `None` when the archive has none.
    pub(super) kernel: Option<String>,
    /// The daemon must refuse here.
    pub(super) must_refuse: bool,
    /// What it said.
    pub(super) reading: Reading,
    /// How long qemu ran, in seconds.
    pub(super) took_secs: f64,
}

impl Row {
    /// Everything is as it must be.
    pub(super) fn is_good(&self) -> bool {
        self.reading.all_defects().is_empty()
    }

    fn verdict(&self) -> String {
        match (self.is_good(), self.must_refuse) {
            (true, false) => "passed".into(),
            (true, true) => "refused, as it must be".into(),
            (false, _) => format!("FAILED: {}", self.reading.all_defects().join("; ")),
        }
    }

    fn tests(&self) -> String {
        if self.must_refuse {
            return "none: nothing is enforced".into();
        }
        let tally = self.reading.tally();
        format!("{} passed, {} failed", tally.passed, tally.failed)
    }

    fn cells(&self) -> [String; 5] {
        let kernel = self.kernel.clone().unwrap_or_else(|| "none in the archive".into());
        [self.series.to_owned(), kernel, self.tests(), format!("{:.0} s", self.took_secs), self.verdict()]
    }
}

const HEADINGS: [&str; 5] = ["Series", "Debian's kernel", "Tests", "Guest ran", "Result"];

/// A table in Markdown, readable as it is.
pub(super) fn table(rows: &[Row]) -> String {
    let cells: Vec<[String; 5]> = rows.iter().map(Row::cells).collect();
    let mut text = format!("| {} |\n|---|---|---|---|---|\n", HEADINGS.join(" | "));
    for row in &cells {
        let _ = writeln!(text, "| {} |", row.each_ref().map(|cell| cell.replace('|', "\\|")).join(" | "));
    }
    text
}

/// The whole of `docs/kernels.md`.
pub(super) fn markdown(rows: &[Row], qemu: &str) -> String {
    let mut text = String::from(HEAD);
    let _ = writeln!(text, "{}", table(rows));
    let _ = writeln!(text, "Written by `cargo xtask test vm --markdown docs/kernels.md`, with {qemu}.\n");
    for row in rows.iter().filter(|row| row.must_refuse) {
        for done in row.reading.steps.iter().filter(|done| done.name == "run") {
            let said = done.said.as_deref().unwrap_or("nothing");
            let _ = writeln!(text, "What `enforcer run` says on {}:\n\n```text\n{said}\n```\n", row.series);
        }
    }
    text.push_str("## What runs in each guest\n\n`enforcer doctor`, then of these programs:\n\n");
    for (name, tests) in TESTS {
        let _ = write!(text, "- `{name}`");
        match tests {
            [""] => text.push_str(": all tests"),
            tests => {
                for test in *tests {
                    let _ = write!(text, "\n  - `{test}`");
                }
            }
        }
        text.push('\n');
    }
    text.push_str(TAIL);
    text
}

const HEAD: &str = "\
# Kernels

`cargo xtask test vm` boots Debian's kernels under qemu and runs end-to-end tests in each: the newest of the series 6.1, 6.12, 6.18 and 7,
and one that is known to stall connections, where the daemon must refuse to enforce and say why. The last result:

";

const TAIL: &str = "
A guest counts as good only if every step had the exit code that it must have, the guest's last marker came, and the kernel's log holds no
`recvmsg seq`, `WARNING`, `BUG:`, `Oops` or panic.

## Running it

`cargo xtask test vm` needs x86-64, apt, and qemu-system-x86 (as root it installs that package by itself, else it says how). Kernels are
downloaded into `target/vm` with an apt configuration of its own and unpacked there; nothing of them is installed. Downloads are kept;
`--offline` does without the archive. `--kernel 6.12` runs one series only. The guests are emulated (no KVM is needed), one processor
each, as many at a time as there are processors: the run shows correctness, never speed, and it takes longer than CI has. Tests that hold for a time limit may
need a machine that does nothing else.

If a series is gone from the archive, the run says so and fails.

## Which kernels stall

On some kernels a connection stalls after the first injected request: dropping the bytes moves `copied_seq` on, the server's read of the
injected ones moves it on again, and the next request looks as if it had been read. Known of 6.12.43 to 6.12.74, 6.16, 6.17, and 6.18
before 6.18.15. The daemon and `enforcer doctor` find it by behaviour, before anything is attached, not by the version. Before 6.1 the
datapath cannot be attached at all.
";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::plan;

    fn row(must_refuse: bool, output: &str) -> Row {
        let steps = if must_refuse { plan::refused() } else { plan::working() };
        let lines: Vec<String> = output.lines().map(str::to_owned).collect();
        Row {
            series: "6.1",
            kernel: Some("6.1.0-56-cloud-amd64 (6.1.192-2)".into()),
            must_refuse,
            reading: plan::read(&lines, &steps),
            took_secs: 61.4,
        }
    }

    #[test]
    fn a_run_that_says_nothing_is_no_success() {
        for must_refuse in [false, true] {
            let row = row(must_refuse, "");
            assert!(!row.is_good());
            assert!(table(&[row]).contains("FAILED"));
        }
    }

    #[test]
    fn the_document_names_every_program_and_the_reason_of_the_refusal() {
        let reason = format!("error: {}", plan::STALL);
        let text = markdown(&[row(true, &format!("@@ begin run\n{reason}\n@@ end run 1"))], "qemu 1");
        assert!(text.contains(&reason));
        for (name, _tests) in TESTS {
            assert!(text.contains(name));
        }
    }
}
