//! Parses requests of the documented API. Parsing is lenient where the samples in the API document require it, and
//! strict otherwise.

use std::{borrow::Cow, collections::BTreeMap, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor},
};
use serde_json::value::{RawValue, to_raw_value};
use vmwatch_api::{
    metrics::Limit,
    wire::{Fault, FaultKind},
};

use super::Documented;

/// Fields of the request body as sent. If a field is repeated, its last value counts, as in Python's `json`.
#[derive(Debug, Default)]
pub(super) struct Body<'a> {
    method: Option<&'a RawValue>,
    data: Option<&'a RawValue>,
    session_id: Option<&'a RawValue>,
    limit: Option<&'a RawValue>,
    proc_name: Option<&'a RawValue>,
    message_id: Option<&'a RawValue>,
    format: Option<&'a RawValue>,
}

/// Format of the rows in the answer, as the request selects it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// Each row is a string with its Python `repr`.
    Python,
    /// Each row is a JSON object.
    Json,
}

/// Decoded parameters of a request, apart from method and session.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Parameters {
    pub(super) message_id: String,
    pub(super) format: Format,
    /// Parameters of the called method, as JSON.
    pub(super) params: Vec<u8>,
}

impl<'a> Body<'a> {
    /// Parses a request body; `None` if it is not exactly one JSON object.
    pub(super) fn parse(bytes: &'a [u8]) -> Option<Self> {
        // Validate the whole body as UTF-8 first, because serde_json accepts invalid UTF-8 in values that it skips.
        serde_json::from_str(std::str::from_utf8(bytes).ok()?).ok()
    }

    /// Looks up the requested method in the table of documented methods.
    pub(super) fn method<'t>(&self, table: &'t [Documented]) -> Result<&'t Documented, Fault> {
        let sent = self.method.map_or("", RawValue::get);
        let code = number_or_numeric_string(sent);
        let row = table.iter().find(|row| Some(u64::from(row.code)) == code);
        row.ok_or_else(|| {
            let known: Vec<_> = table
                .iter()
                .map(|row| format!("{} ({})", row.code, row.name))
                .collect();
            Fault::new(
                FaultKind::Invalid,
                format!("method must be one of {}", known.join(", ")),
            )
        })
    }

    /// Method code as sent by the client, in JSON; `null` if it is absent or invalid.
    pub(super) fn method_echo(&self) -> Cow<'a, str> {
        let Some(sent) = self.method else {
            return Cow::Borrowed("null");
        };
        let sent = sent.get();
        match sent.as_bytes().first() {
            // A number outside the range of a double, such as 1E400, is valid JSON, but many clients cannot parse it.
            Some(b'-' | b'0'..=b'9') if sent.parse().is_ok_and(f64::is_finite) => Cow::Borrowed(sent),
            _ => number_or_numeric_string(sent)
                .map_or(Cow::Borrowed("null"), |code| Cow::Owned(code.to_string())),
        }
    }

    /// Session id as sent by the client; empty if it is absent or not a string.
    pub(super) fn session_id(&self) -> String {
        self.session_id.and_then(text).unwrap_or_default()
    }

    /// Message id to repeat in the answer; empty if it is absent or invalid.
    pub(super) fn message_id_echo(&self) -> String {
        self.message_id().unwrap_or_default()
    }

    fn message_id(&self) -> Result<String, Fault> {
        let Some(sent) = self.message_id else {
            return Ok(String::new());
        };
        text(sent)
            .filter(|id| id.chars().count() <= 128)
            .ok_or_else(|| invalid("message_id must be a string of at most 128 characters"))
    }

    fn format(&self) -> Result<Format, Fault> {
        let Some(sent) = self.format else {
            return Ok(Format::Python);
        };
        match text(sent).as_deref() {
            Some("python") => Ok(Format::Python),
            Some("json") => Ok(Format::Json),
            _ => Err(invalid("format must be \"python\" or \"json\"")),
        }
    }

    fn limit(&self) -> Result<Limit, Fault> {
        let Some(sent) = self.limit else {
            return Ok(Limit::default());
        };
        number_or_numeric_string(sent.get())
            .and_then(Limit::new)
            .ok_or_else(|| invalid(&format!("limit {}", Limit::RULE)))
    }

    /// Validates the remaining fields and encodes the method's parameters as the services expect them.
    pub(super) fn parameters(&self) -> Result<Parameters, Fault> {
        let message_id = self.message_id()?;
        let format = self.format()?;
        let limit = self.limit()?;
        let mut data: BTreeMap<Cow<'_, str>, Cow<'_, RawValue>> = match self.data {
            None => BTreeMap::new(),
            Some(data) => serde_json::from_str::<BTreeMap<String, &RawValue>>(data.get())
                .map_err(|_| invalid("data must be an object with the parameters of the method"))?
                .into_iter()
                .map(|(key, value)| (Cow::Owned(key), Cow::Borrowed(value)))
                .collect(),
        };
        // Not part of the documented API: there, a start of a VM that two hypervisors have fails.
        data.remove("hypervisor");
        data.insert(Cow::Borrowed("limit"), encoded(&limit)?);
        if let Some(id) = data.get("instance_id").and_then(|sent| text(sent)) {
            // Remove the `;` at the end of instance ids, which some samples in the API document contain.
            let id = id
                .trim_start()
                .trim_end_matches(|c: char| c == ';' || c.is_whitespace());
            data.insert(Cow::Borrowed("instance_id"), encoded(id)?);
        }
        if let Some(name) = self.proc_name.filter(|sent| !is_null(sent)) {
            data.insert(Cow::Borrowed("proc_name"), Cow::Borrowed(name));
        }
        if data.get("proc_name").is_some_and(|sent| is_null(sent)) {
            data.remove("proc_name");
        }
        let params = serde_json::to_vec(&data).map_err(unencodable)?;
        Ok(Parameters {
            message_id,
            format,
            params,
        })
    }
}

fn invalid(text: &str) -> Fault {
    Fault::new(FaultKind::Invalid, text)
}

fn encoded<'a, T: serde::Serialize + ?Sized>(value: &T) -> Result<Cow<'a, RawValue>, Fault> {
    to_raw_value(value).map(Cow::Owned).map_err(unencodable)
}

fn unencodable(error: serde_json::Error) -> Fault {
    Fault::new(
        FaultKind::Internal,
        "the request could not be encoded for the service",
    )
    .caused_by(error)
}

fn is_null(sent: &RawValue) -> bool {
    sent.get() == "null"
}

fn text(sent: &RawValue) -> Option<String> {
    serde_json::from_str(sent.get()).ok()
}

/// Parses a JSON integer, or a JSON string of digits.
fn number_or_numeric_string(sent: &str) -> Option<u64> {
    let digits = sent
        .strip_prefix('"')
        .and_then(|rest| rest.strip_suffix('"'))
        .unwrap_or(sent);
    digits
        .bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| digits.parse().ok())
        .flatten()
}

impl<'de> Deserialize<'de> for Body<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Fields)
    }
}

struct Fields;

impl<'de> Visitor<'de> for Fields {
    type Value = Body<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("one JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Body<'de>, A::Error> {
        let mut body = Body::default();
        while let Some(key) = map.next_key::<Cow<'de, str>>()? {
            let field = match &*key {
                "method" => &mut body.method,
                "data" => &mut body.data,
                "session_id" => &mut body.session_id,
                "limit" => &mut body.limit,
                "proc_name" => &mut body.proc_name,
                "message_id" => &mut body.message_id,
                "format" => &mut body.format,
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
            };
            *field = Some(map.next_value()?);
        }
        Ok(body)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::TABLE, *};

    fn params(body: &str) -> Result<String, String> {
        Body::parse(body.as_bytes())
            .unwrap()
            .parameters()
            .map(|parameters| String::from_utf8(parameters.params).unwrap())
            .map_err(|fault| fault.message)
    }

    #[test]
    fn documented_request_yields_the_parameters_of_its_method() {
        let body = r#"{"method":611712,"data":{"instance_id":" 6abf5a1e; "},"session_id":"x","limit":"4","proc_name":"vballoon"}"#;
        assert_eq!(
            params(body).unwrap(),
            r#"{"instance_id":"6abf5a1e","limit":4,"proc_name":"vballoon"}"#
        );
        let inside = r#"{"data":{"proc_name":"a","limit":9}}"#;
        assert_eq!(params(inside).unwrap(), r#"{"limit":10,"proc_name":"a"}"#);
        assert_eq!(
            params(r#"{"data":{"instance_id":"a","hypervisor":"lab"}}"#).unwrap(),
            r#"{"instance_id":"a","limit":10}"#
        );
        assert_eq!(
            params(r#"{"proc_name":null,"data":{"proc_name":null}}"#).unwrap(),
            r#"{"limit":10}"#
        );
    }

    #[test]
    fn documented_request_passes_unknown_parameters_on_to_the_service() {
        assert_eq!(
            params(r#"{"data":{"instance_id":{"$gt":""}}}"#).unwrap(),
            r#"{"instance_id":{"$gt":""},"limit":10}"#
        );
    }

    #[test]
    fn invalid_field_of_documented_request_is_rejected_with_the_rule_it_violates() {
        for (body, rule) in [
            (r#"{"limit":0}"#, "limit must be an integer from 1 to 1000"),
            (r#"{"limit":"-1"}"#, "limit must be"),
            (r#"{"limit":null}"#, "limit must be"),
            (r#"{"limit":4.0}"#, "limit must be"),
            (r#"{"limit":""}"#, "limit must be"),
            (r#"{"format":"xml"}"#, "format must be"),
            (r#"{"format":null}"#, "format must be"),
            (r#"{"message_id":7}"#, "message_id must be"),
            (r#"{"data":[1]}"#, "data must be an object"),
        ] {
            let message = params(body).unwrap_err();
            assert!(message.starts_with(rule), "{body}: {message}");
        }
        assert!(params(&format!(r#"{{"message_id":"{}"}}"#, "é".repeat(128))).is_ok());
        assert!(params(&format!(r#"{{"message_id":"{}"}}"#, "é".repeat(129))).is_err());
    }

    #[test]
    fn method_code_may_be_a_number_or_a_numeric_string() {
        let method = |body: &str| {
            let body = Body::parse(body.as_bytes()).unwrap();
            (
                body.method(TABLE).map(|row| row.name).ok(),
                body.method_echo().into_owned(),
            )
        };
        assert_eq!(
            method(r#"{"method":458753}"#),
            (Some("login"), "458753".to_owned())
        );
        assert_eq!(
            method(r#"{"method":"458753"}"#),
            (Some("login"), "458753".to_owned())
        );
        assert_eq!(method(r#"{"method":1.5}"#), (None, "1.5".to_owned()));
        assert_eq!(method(r#"{"method":"17"}"#), (None, "17".to_owned()));
        assert_eq!(method(r#"{"method":[458753]}"#), (None, "null".to_owned()));
        assert_eq!(method("{}"), (None, "null".to_owned()));
        let message = Body::parse(b"{}").unwrap().method(TABLE).unwrap_err().message;
        assert!(
            message.contains("458753 (login)") && message.contains("32523"),
            "{message}"
        );
    }

    #[test]
    fn request_body_must_be_one_json_object_and_last_value_of_repeated_field_counts() {
        for bad in ["", "[]", "null", "{", "{}{}", "{\"a\":}", "\"x\"", "\u{feff}{}"] {
            assert!(Body::parse(bad.as_bytes()).is_none(), "{bad:?}");
        }
        assert!(Body::parse(b"{\"a\":\"\xff\"}").is_none());
        let deep = format!("{{\"x\":{}{}}}", "[".repeat(30_000), "]".repeat(30_000));
        assert!(Body::parse(deep.as_bytes()).is_some());
        let twice = Body::parse(br#"{"session_id":"a","session_id":"b"}"#).unwrap();
        assert_eq!(twice.session_id(), "b");
    }
}
