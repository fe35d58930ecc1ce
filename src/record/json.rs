//! Events in JSON, read without copying: what a record's messages need of them, and no more.

use std::{borrow::Cow, fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor, value::MapAccessDeserializer},
};
use serde_json::value::RawValue;

/// The fields of an event that are read; others are allowed and ignored. `data` holds either a message or
/// a batch of them.
#[derive(Deserialize)]
pub(super) struct Event<'a> {
    #[serde(borrow, rename = "type")]
    pub kind: Str<'a>,
    #[serde(borrow)]
    pub id: Str<'a>,
    #[serde(borrow)]
    pub time: Str<'a>,
    #[serde(borrow)]
    pub source: Str<'a>,
    #[serde(borrow)]
    pub data: Object<Data<'a>>,
    #[serde(borrow, rename = "partitionkey")]
    pub partition_key: Option<&'a RawValue>,
    #[serde(borrow, rename = "sourceip")]
    pub source_ip: Option<&'a RawValue>,
}

#[derive(Deserialize)]
pub(super) struct Data<'a> {
    #[serde(borrow)]
    pub raw: Option<Str<'a>>,
    #[serde(borrow)]
    pub raw_base64: Option<Str<'a>>,
    #[serde(borrow)]
    pub messages: Option<&'a RawValue>,
}

/// One message: what a batch has for each.
#[derive(Deserialize)]
pub(super) struct OcsMessage<'a> {
    #[serde(borrow)]
    pub id: Str<'a>,
    #[serde(borrow)]
    pub time: Str<'a>,
    #[serde(borrow)]
    pub raw: Str<'a>,
    #[serde(borrow)]
    pub raw_base64: Option<Str<'a>>,
}

/// A string that borrows from the JSON unless it is escaped there. (serde borrows for a bare `Cow`
/// field, not for one inside an `Option`.)
#[derive(Deserialize)]
#[serde(transparent)]
pub(super) struct Str<'a>(#[serde(borrow)] pub Cow<'a, str>);

/// A struct that is written as an object: serde would take an array of its fields, too.
pub(super) struct Object<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ObjectVisitor<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for ObjectVisitor<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Object)
            }
        }

        deserializer.deserialize_map(ObjectVisitor(PhantomData))
    }
}

/// The type of an event that lacks other things.
pub(super) fn kind_of(event: &str) -> Option<Cow<'_, str>> {
    #[derive(Deserialize)]
    struct Kind<'a> {
        #[serde(borrow, rename = "type")]
        kind: Str<'a>,
    }
    serde_json::from_str(event).ok().map(|Object(Kind { kind })| kind.0)
}

pub(super) fn trim(text: &str) -> &str {
    text.trim_matches(is_white_space)
}

fn is_white_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\r')
}

/// Walks through the elements of an array, and parses each where it stands: in one pass, unless one is
/// not a `T`. Gives the array's length, or why `text` is not an array in JSON.
pub(super) fn for_each<'a, T: Deserialize<'a>>(
    text: &'a str,
    mut element: impl FnMut(&'a str, serde_json::Result<T>),
) -> Result<u64, String> {
    let text = trim(text);
    let not_json = |rest: &str, what: &str| {
        Err(format!("not JSON: {what} at byte {} of the array", text.len() - rest.len()))
    };
    let after = |rest: &'a str, sign| {
        rest.strip_prefix(sign).map(|rest| rest.trim_start_matches(is_white_space))
    };
    let Some(mut rest) = after(text, '[') else { return not_json(text, "no array") };
    let mut count = 0;
    let end = loop {
        if count == 0
            && let Some(end) = after(rest, ']')
        {
            break end;
        }
        let (parsed, mut length) = parse(rest);
        if parsed.is_err() {
            // JSON of another shape, or no JSON?
            match parse::<IgnoredAny>(rest) {
                (Ok(_), its_length) => length = its_length,
                (Err(error), _) => return not_json(rest, &error.to_string()),
            }
        }
        let (json, behind) = rest.split_at(length);
        element(json, parsed);
        count += 1;
        rest = behind.trim_start_matches(is_white_space);
        if let Some(next) = after(rest, ',') {
            rest = next;
        } else if let Some(end) = after(rest, ']') {
            break end;
        } else {
            return not_json(rest, "neither `,` nor `]`");
        }
    };
    if end.is_empty() { Ok(count) } else { not_json(end, "more after the array") }
}

/// Parses the value that a text begins with, and says how long that is.
fn parse<'a, T: Deserialize<'a>>(text: &'a str) -> (serde_json::Result<T>, usize) {
    let mut parser = serde_json::Deserializer::from_str(text);
    let parsed = T::deserialize(&mut parser);
    (parsed, parser.into_iter::<IgnoredAny>().byte_offset())
}
