//! Whether every test that `docs/bypass.md` names exists, and every row of its list is accounted for.
//!
//! In the tables a code span that ends in `.rs` is a file, and the spans behind it, up to the next file, are tests in it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

const DOCUMENT: &str = "docs/bypass.md";
/// Rows of the list, numbered from 1.
const ROWS: u32 = 33;
/// Begins the line of a row that has no test of its own.
const EXCUSES: [&str; 2] = ["Not tested here:", "Later:"];

/// Fails naming everything that does not exist.
pub(crate) fn check(root: &Path) -> Result<()> {
    let text = fs::read_to_string(root.join(DOCUMENT)).with_context(|| format!("cannot read {DOCUMENT}"))?;
    let defects = defects(&text, |file| fs::read_to_string(root.join(file)).ok());
    if !defects.is_empty() {
        bail!("{DOCUMENT}: {}", defects.join("; "));
    }
    Ok(())
}

fn defects(document: &str, read: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let (mut defects, mut rows) = (Vec::new(), BTreeSet::new());
    for line in document.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [row, _, tests] = cells.as_slice() else { continue };
        let Ok(row) = row.trim_end_matches(char::is_alphabetic).parse::<u32>() else { continue };
        rows.insert(row);
        let named = tests_in(tests);
        if named.is_empty() && !EXCUSES.iter().any(|excuse| tests.contains(excuse)) {
            defects.push(format!("row {row} names no test and no reason"));
        }
        for (file, test) in named {
            match file.map(|file| (file, read(file))) {
                None => defects.push(format!("row {row}: `{test}` is in no file")),
                Some((file, None)) => defects.push(format!("row {row}: there is no {file}")),
                Some((file, Some(source))) if !defines(&source, test) => {
                    defects.push(format!("row {row}: {file} has no test `{test}`"));
                }
                Some(_) => {}
            }
        }
    }
    defects.extend((1..=ROWS).filter(|row| !rows.contains(row)).map(|row| format!("row {row} is missing")));
    defects
}

/// Tests with their files.
fn tests_in(cell: &str) -> Vec<(Option<&str>, &str)> {
    let (mut file, mut tests) = (None, Vec::new());
    for span in cell.split('`').skip(1).step_by(2) {
        if span.ends_with(".rs") {
            file = Some(span);
        } else {
            tests.push((file, span));
        }
    }
    tests
}

/// Whether a source has a function of this name that is a test: marked as one, or in a macro of property tests.
fn defines(source: &str, test: &str) -> bool {
    let mut marked = false;
    let mut properties = false;
    for line in source.lines().map(str::trim) {
        properties |= line.starts_with("proptest! {");
        if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
            marked = true;
        } else if let Some(function) = line.strip_prefix("async fn ").or_else(|| line.strip_prefix("fn ")) {
            let name = function.split(['(', '<']).next().unwrap_or_default();
            if name == test && (marked || properties) {
                return true;
            }
            marked = false;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_of_this_tree_names_only_what_exists() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        check(root).unwrap();
    }

    #[test]
    fn what_does_not_exist_is_named() {
        let source = "#[test]\n#[ignore]\nfn one() {}\n\nfn helper() {}\n\n#[tokio::test(start_paused = true)]\nasync fn two() {}\n";
        let found = |rows: &str| {
            let mut document: String = (1..=ROWS).map(|row| format!("| {row} | x | Later: y |\n")).collect();
            document.push_str(rows);
            defects(&document, |file| (file == "a.rs").then(|| source.to_owned()))
        };
        assert_eq!(
            found("| 3 | x | `a.rs`: `one`, `two` |\n| 4b | x | `a.rs`: `two` |\n"),
            Vec::<String>::new()
        );
        assert_eq!(found("| row | x | `nothing` |\n"), Vec::<String>::new());
        assert_eq!(found("| 3 | x | `a.rs`: `helper` |\n"), ["row 3: a.rs has no test `helper`"]);
        assert_eq!(found("| 3 | x | `b.rs`: `one` |\n"), ["row 3: there is no b.rs"]);
        assert_eq!(found("| 3 | x | `one`, `a.rs` |\n"), ["row 3: `one` is in no file"]);
        assert_eq!(found("| 3 | x | nothing |\n"), ["row 3 names no test and no reason"]);
        assert_eq!(defects("", |_| None).len(), ROWS as usize);
    }
}
