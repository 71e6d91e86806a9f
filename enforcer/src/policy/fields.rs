//! Reading typed fields from the YAML tree, collecting every defect on the way.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::duration;
use super::error::{BOOLEAN, Caution, DURATION, Defect, PolicyError, PolicyErrors, TEXT, Warning};
use super::node::{At, Node, Value};

/// Collects defects and warnings while a policy is compiled.
#[derive(Debug)]
pub(super) struct Report {
    file: Arc<str>,
    errors: Vec<PolicyError>,
    suppressed: usize,
    warnings: Vec<Warning>,
}

impl Report {
    pub(super) fn new(file: &str) -> Self {
        Self { file: file.into(), errors: Vec::new(), suppressed: 0, warnings: Vec::new() }
    }

    pub(super) fn error(&mut self, at: At, field: impl Into<String>, defect: Defect) {
        if self.errors.len() >= super::MAX_REPORTED_ERRORS {
            self.suppressed += 1;
            return;
        }
        self.errors.push(PolicyError {
            file: Arc::clone(&self.file),
            line: at.line,
            column: at.column,
            field: field.into(),
            defect,
        });
    }

    pub(super) fn warn(&mut self, at: At, field: impl Into<String>, caution: Caution) {
        self.warnings.push(Warning {
            file: Arc::clone(&self.file),
            line: at.line,
            column: at.column,
            field: field.into(),
            caution,
        });
    }

    /// The warnings, or the errors if there were any; both in file order.
    pub(super) fn finish(mut self) -> Result<Vec<Warning>, PolicyErrors> {
        if self.errors.is_empty() {
            self.warnings.sort_by_key(|w| (w.line, w.column));
            return Ok(self.warnings);
        }
        self.errors.sort_by_key(|e| (e.line, e.column));
        Err(PolicyErrors { errors: self.errors, suppressed: self.suppressed })
    }

    /// A report that holds this one error.
    pub(super) fn fail(mut self, at: At, field: &str, defect: Defect) -> PolicyErrors {
        self.error(at, field, defect);
        PolicyErrors { errors: self.errors, suppressed: self.suppressed }
    }
}

/// A value of the file together with its path, e.g. `servers[0].listen`.
#[derive(Debug, Clone)]
pub(super) struct Field<'n> {
    pub(super) node: &'n Node,
    pub(super) path: String,
}

impl<'n> Field<'n> {
    pub(super) fn at(&self) -> At {
        self.node.at
    }

    /// Records a defect of this value.
    pub(super) fn error(&self, report: &mut Report, defect: Defect) {
        report.error(self.node.at, self.path.clone(), defect);
    }

    fn wrong_type(&self, report: &mut Report, expected: &'static str) {
        self.error(report, Defect::WrongType { expected, found: self.node.value.kind() });
    }

    /// Text, not empty, of at most `limit` bytes, without control characters.
    pub(super) fn text(&self, report: &mut Report, limit: usize) -> Option<&'n str> {
        self.text_as(report, limit, TEXT)
    }

    /// Like [`Self::text`]; `expected` names what should be there if it is not text.
    pub(super) fn text_as(
        &self,
        report: &mut Report,
        limit: usize,
        expected: &'static str,
    ) -> Option<&'n str> {
        let Value::Text(text) = &self.node.value else {
            self.wrong_type(report, expected);
            return None;
        };
        if text.is_empty() || text.len() > limit {
            self.error(report, Defect::TextLength { found: text.len(), limit });
            return None;
        }
        if text.chars().any(char::is_control) {
            self.error(report, Defect::ControlCharacter);
            return None;
        }
        Some(text)
    }

    pub(super) fn boolean(&self, report: &mut Report) -> Option<bool> {
        if let Value::Bool(b) = self.node.value {
            return Some(b);
        }
        self.wrong_type(report, BOOLEAN);
        None
    }

    pub(super) fn integer(&self, report: &mut Report) -> Option<u64> {
        if let Value::Integer(n) = self.node.value {
            return Some(n);
        }
        self.wrong_type(report, "a whole number");
        None
    }

    /// A whole number within bounds.
    pub(super) fn number(&self, report: &mut Report, min: u64, max: u64) -> Option<u64> {
        let found = self.integer(report)?;
        if (min..=max).contains(&found) {
            return Some(found);
        }
        self.error(report, Defect::NumberBounds { found, min, max });
        None
    }

    /// One value or a list of at most `limit`, at least one, each through `read`; the second of two equal ones is an error.
    ///
    /// `None` if any is bad.
    pub(super) fn one_or_more<T: PartialEq + ToString>(
        &self,
        report: &mut Report,
        limit: usize,
        mut read: impl FnMut(&mut Report, &Field<'n>) -> Option<T>,
    ) -> Option<Vec<T>> {
        let entries = match self.node.value {
            Value::List(_) => self.list(report, limit)?,
            _ => vec![self.clone()],
        };
        if entries.is_empty() {
            self.error(report, Defect::EmptyList);
        }
        let mut good = !entries.is_empty();
        let mut out: Vec<(T, u64)> = Vec::new();
        for entry in entries {
            let Some(value) = read(report, &entry) else {
                good = false;
                continue;
            };
            if let Some((_, first_line)) = out.iter().find(|(earlier, _)| *earlier == value) {
                let (value, first_line) = (value.to_string(), *first_line);
                entry.error(report, Defect::DuplicateValue { value, first_line });
                good = false;
                continue;
            }
            out.push((value, entry.at().line));
        }
        good.then(|| out.into_iter().map(|(value, _)| value).collect())
    }

    /// A duration within bounds.
    pub(super) fn duration(&self, report: &mut Report, min: Duration, max: Duration) -> Option<Duration> {
        let text = self.text_as(report, 64, DURATION)?;
        let Some(found) = duration::parse(text) else {
            self.error(report, Defect::Duration { value: text.to_owned() });
            return None;
        };
        if found < min || found > max {
            let [found, min, max] = [found, min, max].map(duration::format);
            self.error(report, Defect::DurationBounds { found, min, max });
            return None;
        }
        Some(found)
    }

    /// A file's path; a relative one is relative to the directory that the policy lies in.
    pub(super) fn file(&self, report: &mut Report, directory: &std::path::Path) -> Option<PathBuf> {
        self.text(report, 4096).map(|text| directory.join(text))
    }

    /// The entries of a list of at most `limit` entries.
    pub(super) fn list(&self, report: &mut Report, limit: usize) -> Option<Vec<Field<'n>>> {
        let Value::List(items) = &self.node.value else {
            self.wrong_type(report, "a list");
            return None;
        };
        if items.len() > limit {
            self.error(report, Defect::TooManyEntries { found: items.len(), limit });
            return None;
        }
        let entry = |(i, node)| Field { node, path: format!("{}[{i}]", self.path) };
        Some(items.iter().enumerate().map(entry).collect())
    }

    /// A list of texts, each through `check`; the second of two equal results is an error.
    ///
    /// `None` if the list or any entry is bad.
    pub(super) fn texts<'f>(
        &'f self,
        report: &mut Report,
        limit: usize,
        text_limit: usize,
        mut check: impl FnMut(&Field<'n>, &str) -> Result<String, Defect>,
    ) -> Option<Vec<String>> {
        let mut seen: HashMap<String, u64> = HashMap::new();
        let mut good = true;
        let mut out = Vec::new();
        for entry in self.list(report, limit)? {
            let Some(text) = entry.text(report, text_limit) else {
                good = false;
                continue;
            };
            match check(&entry, text) {
                Ok(value) => match seen.get(&value) {
                    Some(&first_line) => {
                        entry.error(report, Defect::DuplicateValue { value, first_line });
                        good = false;
                    }
                    None => {
                        seen.insert(value.clone(), entry.at().line);
                        out.push(value);
                    }
                },
                Err(defect) => {
                    entry.error(report, defect);
                    good = false;
                }
            }
        }
        good.then_some(out)
    }

    /// The fields of a mapping; reports unknown and repeated ones.
    pub(super) fn mapping(
        &self,
        report: &mut Report,
        allowed: &'static [&'static str],
    ) -> Option<Mapping<'n>> {
        let Value::Map(entries) = &self.node.value else {
            self.wrong_type(report, "a mapping");
            return None;
        };
        let mut fields: HashMap<&'static str, (u64, &'n Node)> = HashMap::new();
        for (key, value) in entries {
            let Value::Text(name) = &key.value else {
                let found = key.value.kind();
                report.error(
                    key.at,
                    self.path.clone(),
                    Defect::WrongType { expected: "a field name", found },
                );
                continue;
            };
            let Some(known) = allowed.iter().copied().find(|a| a == name) else {
                let nearest = nearest(name, allowed);
                let field = printable(name);
                report.error(key.at, self.path.clone(), Defect::UnknownField { field, nearest, allowed });
                continue;
            };
            if let Some((first_line, _)) = fields.get(known) {
                let defect = Defect::DuplicateField { field: known.to_owned(), first_line: *first_line };
                report.error(key.at, self.child_path(known), defect);
                continue;
            }
            fields.insert(known, (key.at.line, value));
        }
        Some(Mapping { at: self.node.at, path: self.path.clone(), fields })
    }

    fn child_path(&self, name: &str) -> String {
        join(&self.path, name)
    }
}

/// The known fields of a mapping.
#[derive(Debug)]
pub(super) struct Mapping<'n> {
    /// Where it begins.
    pub(super) at: At,
    /// Its path; empty for the file's top level.
    pub(super) path: String,
    fields: HashMap<&'static str, (u64, &'n Node)>,
}

impl<'n> Mapping<'n> {
    pub(super) fn optional(&self, name: &'static str) -> Option<Field<'n>> {
        self.fields.get(name).map(|(_, node)| Field { node, path: join(&self.path, name) })
    }

    /// A field that must be there; one with no value counts as missing.
    pub(super) fn required(&self, report: &mut Report, name: &'static str) -> Option<Field<'n>> {
        let field = self.optional(name);
        match field {
            Some(Field { node: Node { at, value: Value::Null }, path }) => {
                report.error(*at, path, Defect::MissingField { field: name });
                None
            }
            Some(field) => Some(field),
            None => {
                report.error(self.at, join(&self.path, name), Defect::MissingField { field: name });
                None
            }
        }
    }

    /// Whether the file holds the field at all, well-formed or not.
    pub(super) fn has(&self, name: &str) -> bool {
        self.fields.contains_key(name)
    }

    /// An optional field read by `read`, or its default. `None` only if it is there and bad.
    pub(super) fn or_default<T>(
        &self,
        name: &'static str,
        default: T,
        read: impl FnOnce(Field<'n>) -> Option<T>,
    ) -> Option<T> {
        self.optional(name).map_or(Some(default), read)
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

/// A key from the file as it may stand in a message: bounded, without control characters.
fn printable(name: &str) -> String {
    name.chars().take(64).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// The allowed name that differs from `name` in at most two letters.
fn nearest(name: &str, allowed: &[&'static str]) -> Option<&'static str> {
    if name.len() > 32 {
        return None;
    }
    let name = name.to_ascii_lowercase().replace('-', "_");
    allowed.iter().copied().map(|a| (distance(&name, a), a)).filter(|(d, _)| *d <= 2).min().map(|(_, a)| a)
}

/// Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut left = i + 1;
        let mut next = vec![left];
        for (y, pair) in b.iter().zip(row.windows(2)) {
            let substituted = pair[0] + usize::from(x != *y);
            left = substituted.min(pair[1] + 1).min(left + 1);
            next.push(left);
        }
        row = next;
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_found() {
        let allowed = &["listen", "resource", "public_paths"];
        assert_eq!(nearest("listens", allowed), Some("listen"));
        assert_eq!(nearest("public-paths", allowed), Some("public_paths"));
        assert_eq!(nearest("Ressource", allowed), Some("resource"));
        assert_eq!(nearest("audience", allowed), None);
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
    }
}
