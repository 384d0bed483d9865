//! Reads one YAML mapping field by field, so that every fault is found, not only the first.

use std::fmt::Display;
use std::str::FromStr;

use serde_yaml_ng::{Mapping, Value};

use crate::Fault;

/// One item of a list of the ConfigMap (or the trench itself) while it is read.
pub(crate) struct Item<'a> {
    /// Kind and name for faults.
    pub(crate) object: String,
    place: String,
    fields: &'a Mapping,
    used: Vec<&'static str>,
    faults: &'a mut Vec<Fault>,
}

impl<'a> Item<'a> {
    /// `place` says where the item stands, e.g. `key "flows", item 2`.
    pub(crate) fn new(kind: &str, place: String, value: &'a Value, faults: &'a mut Vec<Fault>) -> Option<Self> {
        let Value::Mapping(fields) = value else {
            faults.push(Fault::new(place, "has to be a mapping of fields"));
            return None;
        };
        let object = match fields.get("name") {
            Some(Value::String(name)) if !name.is_empty() => format!("{kind} {name}"),
            _ => format!("{kind} ({place})"),
        };
        Some(Self { object, place, fields, used: Vec::new(), faults })
    }

    pub(crate) fn fault(&mut self, reason: impl Into<String>) {
        self.faults.push(Fault::new(self.object.clone(), reason));
    }

    /// The value of a field; an explicit null counts as absent.
    fn get(&mut self, field: &'static str) -> Option<&'a Value> {
        self.used.push(field);
        self.fields.get(field).filter(|value| !value.is_null())
    }

    /// Fields that are known, but not judged.
    pub(crate) fn pass_over(&mut self, fields: &[&'static str]) {
        self.used.extend(fields);
    }

    pub(crate) fn has(&self, field: &str) -> bool {
        self.fields.get(field).is_some_and(|value| !value.is_null())
    }

    pub(crate) fn text(&mut self, field: &'static str) -> Option<String> {
        match self.get(field)? {
            Value::String(text) => Some(text.clone()),
            other => {
                self.fault(format!("{field} has to be text, it is {}", shape(other)));
                None
            }
        }
    }

    /// A text that must be there and not be empty.
    pub(crate) fn required(&mut self, field: &'static str) -> Option<String> {
        if !self.has(field) {
            self.used.push(field);
            self.fault(format!("{field} is missing"));
            return None;
        }
        let text = self.text(field)?;
        if text.is_empty() {
            self.fault(format!("{field} is empty"));
            return None;
        }
        Some(text)
    }

    /// A required text that is parsed; the parser's message becomes the fault.
    pub(crate) fn parsed<T>(&mut self, field: &'static str, parse: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        let text = self.required(field)?;
        parse(&text).map_err(|reason| self.fault(labelled(field, &reason))).ok()
    }

    /// A whole number within `least..=most`.
    pub(crate) fn number<T>(&mut self, field: &'static str, least: T, most: T) -> Option<T>
    where
        T: TryFrom<i64> + PartialOrd + Display + Copy,
    {
        let value = self.get(field)?;
        let number = value.as_i64().and_then(|n| T::try_from(n).ok()).filter(|n| (least..=most).contains(n));
        if number.is_none() {
            self.fault(format!("{field} has to be a number from {least} to {most}, it is {}", shape(value)));
        }
        number
    }

    /// A number that must be there.
    pub(crate) fn required_number<T>(&mut self, field: &'static str, least: T, most: T) -> Option<T>
    where
        T: TryFrom<i64> + PartialOrd + Display + Copy,
    {
        if !self.has(field) {
            self.used.push(field);
            self.fault(format!("{field} is missing"));
            return None;
        }
        self.number(field, least, most)
    }

    pub(crate) fn flag(&mut self, field: &'static str) -> bool {
        match self.get(field) {
            None => false,
            Some(Value::Bool(flag)) => *flag,
            Some(other) => {
                self.fault(format!("{field} has to be true or false, it is {}", shape(other)));
                false
            }
        }
    }

    /// A list of texts; absent means none. A bare number is taken as its text (`- 80` in a list of port ranges).
    pub(crate) fn texts(&mut self, field: &'static str) -> Vec<String> {
        let mut texts = Vec::new();
        for value in self.values(field) {
            match value {
                Value::String(text) => texts.push(text.clone()),
                Value::Number(number) => texts.push(number.to_string()),
                other => self.fault(format!("{field} has to hold texts, it holds {}", shape(other))),
            }
        }
        texts
    }

    /// A list of texts that are parsed; each bad one is a fault of its own.
    pub(crate) fn parsed_list<T>(&mut self, field: &'static str, parse: impl Fn(&str) -> Result<T, String>) -> Vec<T> {
        let texts = self.texts(field);
        texts
            .iter()
            .filter_map(|text| parse(text).map_err(|reason| self.fault(labelled(field, &reason))).ok())
            .collect()
    }

    /// A list of any values; absent means none.
    pub(crate) fn values(&mut self, field: &'static str) -> &'a [Value] {
        match self.get(field) {
            None => &[],
            Some(Value::Sequence(values)) => values,
            Some(other) => {
                self.fault(format!("{field} has to be a list, it is {}", shape(other)));
                &[]
            }
        }
    }

    /// Reads a mapping inside this item; its faults name this item.
    pub(crate) fn nested<T>(
        &mut self,
        field: &str,
        value: &'a Value,
        read: impl FnOnce(&mut Item<'_>) -> T,
    ) -> Option<T> {
        let Value::Mapping(fields) = value else {
            self.fault(format!("{field} has to be a mapping of fields, it is {}", shape(value)));
            return None;
        };
        let object = format!("{}, {field}", self.object);
        let mut item = Item { object, place: self.place.clone(), fields, used: Vec::new(), faults: self.faults };
        let result = read(&mut item);
        item.finish();
        Some(result)
    }

    /// As [`Item::nested`] for a field that may be absent.
    pub(crate) fn nested_field<T>(&mut self, field: &'static str, read: impl FnOnce(&mut Item<'_>) -> T) -> Option<T> {
        let value = self.get(field)?;
        self.nested(field, value, read)
    }

    /// Every field that nobody asked for is a fault.
    pub(crate) fn finish(mut self) {
        for key in self.fields.keys() {
            let name = key.as_str().map_or_else(|| shape(key), str::to_owned);
            if !self.used.contains(&name.as_str()) {
                let place = self.place.clone();
                self.fault(format!("unknown field {name:?} ({place})"));
            }
        }
    }
}

/// Puts the field before the reason unless the reason already speaks of it.
fn labelled(field: &str, reason: &str) -> String {
    if reason.starts_with('"') { format!("{field} {reason}") } else { format!("{field}: {reason}") }
}

/// How a value of the wrong type is shown.
fn shape(value: &Value) -> String {
    match value {
        Value::Null => "empty".to_owned(),
        Value::Bool(flag) => flag.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => format!("{text:?}"),
        Value::Sequence(_) => "a list".to_owned(),
        Value::Mapping(_) => "a mapping".to_owned(),
        Value::Tagged(tagged) => format!("tagged {}", tagged.tag),
    }
}

/// `FromStr` as a parser for [`Item::parsed`].
pub(crate) fn from_str<T: FromStr<Err = String>>(text: &str) -> Result<T, String> {
    text.parse()
}
