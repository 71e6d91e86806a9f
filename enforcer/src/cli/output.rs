//! Tables and JSON on stdout.

use std::io::{ErrorKind, Write};

use anyhow::Context as _;
use clap::ValueEnum;
use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

/// How results are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Output {
    /// For people: plain text, one row a line, without colours.
    #[default]
    #[value(alias = "text")]
    Table,
    /// For programs: one JSON document; field names carry their units.
    Json,
}

/// What a command found, in both forms.
pub(super) trait Render: Serialize {
    /// The text for people, ending in a newline.
    fn text(&self) -> String;
}

/// Writes a result to stdout.
pub(super) fn print<T: Render>(output: Output, result: &T) -> anyhow::Result<()> {
    match output {
        Output::Table => print_text(&result.text()),
        Output::Json => {
            let mut text = serde_json::to_string_pretty(result).context("cannot write JSON")?;
            text.push('\n');
            print_text(&text)
        }
    }
}

/// Writes text to stdout. A reader that went away (`| head`) has what it wanted.
pub(super) fn print_text(text: &str) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error).context("cannot write to stdout"),
        _ => Ok(()),
    }
}

/// Writes a message to stderr; if nobody reads it there is nobody to tell.
pub(super) fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// A table with a header, as text. Rows are never wrapped, so that one row is one line for `grep`.
pub(super) fn table<const N: usize>(
    header: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let mut table = plain();
    table.set_header(header);
    table.add_rows(rows.into_iter().map(|row| row.map(|cell| clean(&cell))));
    finish(&table)
}

/// Names and values, one pair a line.
pub(super) fn pairs<'a>(pairs: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let mut table = plain();
    table.add_rows(pairs.into_iter().map(|(name, value)| [name.to_owned(), clean(&value)]));
    finish(&table)
}

fn plain() -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table
}

fn finish(table: &Table) -> String {
    let mut text = String::new();
    for line in table.lines() {
        // Cells are padded with one blank at both sides; a line begins with a cell.
        text.push_str(line.strip_prefix(' ').unwrap_or(&line).trim_end());
        text.push('\n');
    }
    text
}

/// Names in tables come from tokens and policies: no character of theirs may move the cursor, break the line or turn the
/// direction of the text.
fn clean(text: &str) -> String {
    let moves = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars().map(|c| if moves(c) { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_a_line() {
        let long = "x".repeat(400);
        let rows = [["1".to_owned(), long.clone()], ["22".to_owned(), "a\nb\x1b[2J\u{202e}".to_owned()]];
        let text = table(["ID", "NAME"], rows);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert_eq!(lines[0], "ID  NAME");
        assert_eq!(lines[1], format!("1   {long}"));
        assert_eq!(lines[2], "22  a\u{fffd}b\u{fffd}[2J\u{fffd}");
    }

    #[test]
    fn pairs_are_aligned() {
        assert_eq!(pairs([("a", "1".to_owned()), ("long", "2".to_owned())]), "a     1\nlong  2\n");
    }
}
