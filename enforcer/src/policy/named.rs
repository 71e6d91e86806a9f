//! Lists that name things of the same file.

use super::error::Defect;
use super::fields::{Field, Report};
use super::server::Placed;

/// The names of one kind of thing in a file.
pub(super) struct Names {
    /// The kind, for messages.
    pub(super) what: &'static str,
    /// In file order, each once.
    pub(super) known: Vec<Placed<String>>,
    /// Some name could not be read, so one that looks unknown may be meant.
    pub(super) nameless: bool,
}

impl Names {
    pub(super) fn new(what: &'static str) -> Self {
        Self { what, known: Vec::new(), nameless: false }
    }

    /// Adds a thing's name as far as it could be read; a second one of the same name is an error. The name, if it is new.
    pub(super) fn add(&mut self, report: &mut Report, name: Option<Placed<String>>) -> Option<String> {
        let Some(name) = name else {
            self.nameless = true;
            return None;
        };
        if let Some(first) = self.known.iter().find(|known| known.value == name.value) {
            let defect =
                Defect::DuplicateName { what: self.what, first_line: first.at.line, name: name.value };
            report.error(name.at, name.field, defect);
            return None;
        }
        let value = name.value.clone();
        self.known.push(name);
        Some(value)
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.known.iter().any(|known| known.value == name)
    }

    /// A list of known names, or one of them; at least one.
    pub(super) fn listed(&self, report: &mut Report, field: &Field<'_>, limit: usize) -> Option<Vec<String>> {
        field.one_or_more(report, limit, |report, entry| {
            let name = entry.text(report, 1024)?;
            if self.has(name) || self.nameless {
                return Some(name.to_owned());
            }
            let mut known: Vec<String> = self.known.iter().map(|known| known.value.clone()).collect();
            known.sort_unstable();
            entry.error(report, Defect::UnknownName { what: self.what, name: name.to_owned(), known });
            None
        })
    }
}
