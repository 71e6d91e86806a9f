//! A policy file as a tree in which every value knows its line and column.
//!
//! The tree keeps repeated keys, unknown keys and values of the wrong type, so that the checks that follow can report
//! all of them at once, instead of stopping at the first as a derived deserializer would.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::options::{DuplicateKeyPolicy, MergeKeyPolicy, NonFiniteFloatPolicy};
use serde_saphyr::{DefaultMessageFormatter, Error, MessageFormatter, Spanned};

use super::error::Defect;

/// A place in the policy file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct At {
    /// Line, from 1.
    pub(super) line: u64,
    /// Column in characters, from 1.
    pub(super) column: u64,
}

impl At {
    /// The beginning of the file, for a defect that has no better place.
    pub(super) const START: Self = Self { line: 1, column: 1 };

    fn of(location: serde_saphyr::Location) -> Self {
        Self { line: location.line().max(1), column: location.column().max(1) }
    }
}

/// One YAML value.
#[derive(Debug)]
pub(super) struct Node {
    /// Where it begins.
    pub(super) at: At,
    /// What it is.
    pub(super) value: Value,
}

/// The kinds of YAML values.
#[derive(Debug)]
pub(super) enum Value {
    /// Nothing, `~` or `null`.
    Null,
    /// `true` or `false`; `yes`, `on` and the like stay text.
    Bool(bool),
    /// A whole number that is not negative.
    Integer(u64),
    /// Any other number.
    Number,
    /// Text.
    Text(String),
    /// A list.
    List(Vec<Node>),
    /// A mapping, in file order, repeated keys included.
    Map(Vec<(Node, Node)>),
}

impl Value {
    /// The kind's name in messages.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "nothing",
            Self::Bool(_) => "a boolean",
            Self::Integer(_) | Self::Number => "a number",
            Self::Text(_) => "text",
            Self::List(_) => "a list",
            Self::Map(_) => "a mapping",
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        Ok(Self { at: At::of(spanned.referenced), value: spanned.value })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(u64::try_from(v).map_or(Value::Number, Value::Integer))
    }

    fn visit_i128<E>(self, _: i128) -> Result<Value, E> {
        Ok(Value::Number)
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(Value::Integer(v))
    }

    fn visit_u128<E>(self, _: u128) -> Result<Value, E> {
        Ok(Value::Number)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Value, E> {
        Ok(Value::Number)
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(Value::Text(v.to_owned()))
    }

    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(Value::Text(v))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Value::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Value::Map(entries))
    }
}

/// Reads `text` as one YAML document.
///
/// Anchors, aliases and merge keys are refused: a policy should read the same from top to bottom, and without them the
/// tree is never larger than the file. Nesting, nodes and events are bounded.
///
/// # Errors
/// The parser's first complaint and its place.
pub(super) fn parse(text: &str) -> Result<Node, (At, Defect)> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: 16,
            flow_nesting_limit: 16,
            max_nodes: 200_000,
            max_events: 500_000,
            max_documents: 1,
            max_anchors: 0,
            max_aliases: 0,
            max_total_scalar_bytes: super::MAX_FILE_BYTES,
        },
        // Repeated keys reach the tree, where both of their places are known.
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        merge_keys: MergeKeyPolicy::Error,
        non_finite_float_policy: NonFiniteFloatPolicy::PassThrough,
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
        strict_booleans: true,
        reject_unsupported_tags: true,
        with_snippet: false,
    };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let at = error.location().map_or(At::START, At::of);
        (at, defect(&error))
    })
}

fn defect(error: &Error) -> Defect {
    use serde_saphyr::budget::BudgetBreach::{Aliases, Anchors};
    match error {
        Error::MergeKeyNotAllowed { .. }
        | Error::UnknownAnchor { .. }
        | Error::Budget { breach: Aliases { .. } | Anchors { .. }, .. } => Defect::YamlIndirection,
        _ => Defect::Yaml { message: DefaultMessageFormatter.format_message(error).trim().to_owned() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_knows_its_place() {
        let node = parse("a: 1\nb:\n  - x\n  - {c: ~, c: 'y'}\n").expect("well-formed");
        assert_eq!(node.at, At { line: 1, column: 1 });
        let Value::Map(entries) = node.value else { panic!("a mapping") };
        assert_eq!(entries[0].1.at, At { line: 1, column: 4 });
        assert!(matches!(entries[0].1.value, Value::Integer(1)));
        assert_eq!(entries[1].0.at, At { line: 2, column: 1 });
        let Value::List(items) = &entries[1].1.value else { panic!("a list") };
        assert_eq!(items[0].at, At { line: 3, column: 5 });
        let Value::Map(inner) = &items[1].value else { panic!("a mapping") };
        assert_eq!(inner.len(), 2, "repeated keys are kept");
        assert_eq!(inner[1].0.at, At { line: 4, column: 12 });
        assert!(matches!(inner[0].1.value, Value::Null));
    }

    #[test]
    fn bad_syntax_is_refused_with_its_place() {
        for (text, line) in [("a: 1\n b: [\n", 2), ("a: 1\n---\nb: 2\n", 2), ("a: !secret 1\n", 1)] {
            let (at, defect) = parse(text).expect_err(text);
            assert!(at.line.abs_diff(line) <= 1, "{text:?}: {at:?} {defect}");
            assert!(matches!(defect, Defect::Yaml { .. }));
        }
    }

    #[test]
    fn indirection_is_refused_with_its_place() {
        for text in
            ["b: 2\na: &x 1\n", "b: 2\na: *x\n", "b: 2\n<<: {a: 1}\n", "a: 1\n&x b: 2\n", "a:\n  - &x {}\n"]
        {
            let (at, defect) = parse(text).expect_err(text);
            assert_eq!((at.line, defect), (2, Defect::YamlIndirection), "{text:?}");
        }
    }

    #[test]
    fn deep_nesting_is_refused() {
        let text = format!("a: {}{}", "[".repeat(5000), "]".repeat(5000));
        assert!(parse(&text).is_err());
    }
}
