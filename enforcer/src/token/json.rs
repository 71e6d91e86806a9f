//! JSON objects in which no object, at any depth, names a member twice.
//!
//! RFC 7519, section 4 lets a parser either refuse duplicate names or take the last one. Two parsers that differ here
//! read two different tokens, so duplicates are refused.

use std::cell::RefCell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::error::Quoted;

/// Why bytes are not the JSON object that was expected. Holds positions and quoted names, never whole values.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum JsonDefect {
    /// The bytes are not one JSON text (RFC 8259), or nest deeper than 128 levels.
    #[error("not JSON: defect at line {line}, column {column}")]
    Syntax { line: usize, column: usize },
    /// The JSON text is not an object.
    #[error("a JSON {found}, not an object")]
    NotObject { found: &'static str },
    /// An object names a member twice.
    #[error("the member {name} appears twice")]
    DuplicateMember { name: Quoted },
}

/// Parses `bytes` as exactly one JSON object without duplicate member names at any depth.
pub(crate) fn parse_object(bytes: &[u8]) -> Result<Map<String, Value>, JsonDefect> {
    let duplicate = RefCell::new(None);
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = Strict { duplicate: &duplicate }
        .deserialize(&mut deserializer)
        .and_then(|v| deserializer.end().map(|()| v));
    match (value, duplicate.into_inner()) {
        (_, Some(name)) => Err(JsonDefect::DuplicateMember { name }),
        (Ok(Value::Object(map)), None) => Ok(map),
        (Ok(other), None) => Err(JsonDefect::NotObject { found: type_name(&other) }),
        (Err(error), None) => Err(JsonDefect::Syntax { line: error.line(), column: error.column() }),
    }
}

/// The JSON type of a value, as error messages call it.
pub(crate) fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// Builds a [`Value`] and stops at the first duplicate name, which it leaves in `duplicate`.
#[derive(Clone, Copy)]
struct Strict<'a> {
    duplicate: &'a RefCell<Option<Quoted>>,
}

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("number out of range"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(self)? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(name) = access.next_key::<String>()? {
            if map.contains_key(&name) {
                *self.duplicate.borrow_mut() = Some(Quoted::new(&name));
                return Err(A::Error::custom("duplicate member name"));
            }
            let value = access.next_value_seed(self)?;
            map.insert(name, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duplicates_are_refused_at_any_depth_and_under_escapes() {
        for text in [
            r#"{"a":1,"a":2}"#,
            r#"{"a":1,"\u0061":2}"#,
            r#"{"x":{"a":1,"a":1}}"#,
            r#"{"x":[{"a":null,"a":null}]}"#,
        ] {
            assert_eq!(
                parse_object(text.as_bytes()),
                Err(JsonDefect::DuplicateMember { name: Quoted::new("a") }),
                "{text}"
            );
        }
        assert!(parse_object(br#"{"a":{"a":1},"b":[{"a":1},{"a":1}]}"#).is_ok());
    }

    #[test]
    fn only_one_whole_object_is_accepted() {
        assert_eq!(parse_object(b"[]"), Err(JsonDefect::NotObject { found: "array" }));
        assert_eq!(parse_object(b"\"x\""), Err(JsonDefect::NotObject { found: "string" }));
        let deep = "{\"a\":".repeat(200);
        let rows: [&[u8]; 8] = [
            b"",
            b"{} x",
            b"{}{}",
            b"\xef\xbb\xbf{}",
            b"{\"a\":\"\xff\"}",
            b"{\"a\":\"\\ud800\"}",
            b"{\0\"\0a\0",
            deep.as_bytes(),
        ];
        for bytes in rows {
            assert!(matches!(parse_object(bytes), Err(JsonDefect::Syntax { .. })), "{bytes:?}");
        }
        assert_eq!(parse_object(b" {\"a\": -1} \n").unwrap()["a"], Value::from(-1));
    }
}
