//! The last run's table in a document.

use std::fmt::Write as _;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result};

use super::table::{HEADINGS, row};
use super::{Report, figures};

const BEGIN: &str = "<!-- figures: written by enforcer-bench --markdown -->";
const END: &str = "<!-- end of figures -->";

/// Writes the figures with machine and command into the document at `path`: between its two marker comments, or into
/// a new file with nothing but them.
///
/// # Errors
/// When the file can't be read or written, or exists without the markers.
pub fn write_markdown(report: &Report, path: &Path) -> Result<()> {
    let section = section(report)?;
    let document = match fs::read_to_string(path) {
        Ok(text) => replace(&text, &section).with_context(|| {
            format!("{} has no lines `{BEGIN}` and `{END}` to write between", path.display())
        })?,
        Err(error) if error.kind() == ErrorKind::NotFound => format!("{BEGIN}\n\n{section}\n{END}\n"),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    fs::write(path, document).with_context(|| format!("cannot write {}", path.display()))
}

fn replace(document: &str, section: &str) -> Option<String> {
    let (before, rest) = document.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n\n{section}\n{END}{after}"))
}

fn section(report: &Report) -> Result<String> {
    let mut text = String::new();
    writeln!(text, "{}.\n", report.machine.line())?;
    writeln!(text, "```console\n# {}\n```\n", report.command)?;
    writeln!(text, "| {} |", HEADINGS.join(" | "))?;
    writeln!(text, "|---|--:|--:|--:|--:|---|")?;
    for figure in figures(&report.samples)? {
        writeln!(text, "| {} |", row(&figure).join(" | "))?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_markers_is_replaced() {
        let once = replace(&format!("a\n{BEGIN}\nold\n{END}\nz\n"), "new\n").unwrap();
        assert_eq!(once, format!("a\n{BEGIN}\n\nnew\n\n{END}\nz\n"));
        assert_eq!(replace(&once, "new\n").unwrap(), once);
        assert_eq!(replace("no markers", "new"), None);
        assert_eq!(replace(&format!("{END} {BEGIN}"), "new"), None);
    }
}
