//! Extractors for the typed parts of a REST request. A request with an invalid value is rejected with the name of the
//! field and the rule. Unknown fields are rejected too; otherwise a misspelt filter would silently be ignored.

use std::{fmt, str::FromStr, sync::Arc};

use axum::{
    extract::{FromRequest, FromRequestParts, RawPathParams, Request},
    http::{StatusCode, header, request::Parts},
};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{DeserializeOwned, Error, Visitor},
};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{ObjectBuilder, RefOr, Schema, Type},
};
use vmwatch_api::metrics::Limit;

use super::problem::Problem;
use crate::Gateway;

/// Query parameters, decoded into a type with `deny_unknown_fields`.
#[derive(Debug)]
pub(super) struct Query<T>(pub(super) T);

/// Query parameters of a route that has none.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NoParameters {}

impl<T: DeserializeOwned> FromRequestParts<Arc<Gateway>> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &Arc<Gateway>) -> Result<Self, Problem> {
        let parsed = axum::extract::Query::<T>::try_from_uri(&parts.uri);
        parsed.map(|query| Self(query.0)).map_err(|rejection| {
            let text = rejection.body_text();
            let rule = text
                .strip_prefix("Failed to deserialize query string: ")
                .unwrap_or(&text);
            Problem::invalid(format!("query: {}", rule.replace('`', "")))
        })
    }
}

/// The only path parameter of a route.
#[derive(Debug)]
pub(super) struct Path<T>(pub(super) T);

impl<T: FromStr<Err: fmt::Display>> FromRequestParts<Arc<Gateway>> for Path<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &Arc<Gateway>) -> Result<Self, Problem> {
        let params = RawPathParams::from_request_parts(parts, state)
            .await
            .map_err(|rejection| Problem::invalid(rejection.body_text()))?;
        let Some((name, value)) = params.iter().next() else {
            return Err(Problem::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "internal",
                "this route has no path parameter",
            ));
        };
        value
            .parse()
            .map(Self)
            .map_err(|rule| Problem::invalid(format!("{name} {rule}")))
    }
}

/// JSON request body, decoded into a type with `deny_unknown_fields`.
#[derive(Debug)]
pub(super) struct Json<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<Arc<Gateway>> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &Arc<Gateway>) -> Result<Self, Problem> {
        let is_json = request
            .headers()
            .get(header::CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split(';').next())
            .is_some_and(|essence| essence.trim().eq_ignore_ascii_case("application/json"));
        if !is_json {
            let detail = "the body must be application/json";
            return Err(Problem::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "unsupported_media_type",
                detail,
            ));
        }
        // The body is in memory already: the middleware has read it and enforced the limits, so this needs no limit.
        let bytes = axum::body::to_bytes(request.into_body(), usize::MAX)
            .await
            .map_err(|_| Problem::invalid("the body could not be read completely"))?;
        decode(&bytes).map(Self)
    }
}

/// Decodes a JSON object. Error messages name the field and the rule but never the value, which may be a password.
fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    // Reject arrays, because serde would decode a struct from an array as well, field by field.
    if bytes.trim_ascii_start().first() != Some(&b'{') {
        return Err(Problem::invalid("body: must be a JSON object"));
    }
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let decoded = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        let rule = inner.to_string().replace('`', "");
        let location = if path == "." {
            String::new()
        } else {
            format!("{path}: ")
        };
        Problem::invalid(format!("body: {location}{rule}"))
    })?;
    json.end()
        .map_err(|_| Problem::invalid("body: unexpected data after the JSON value"))?;
    Ok(decoded)
}

/// Decodes a filter value. Rejects values that this version does not know; in stored data they would decode as
/// `unknown`.
pub(super) fn known<'de, T, D>(deserializer: D) -> Result<Option<T>, D::Error>
where
    T: DeserializeOwned + serde::Serialize,
    D: Deserializer<'de>,
{
    let text = String::deserialize(deserializer)?;
    let value = T::deserialize(serde_json::Value::from(text.as_str())).map_err(D::Error::custom)?;
    let written = serde_json::to_value(&value).map_err(D::Error::custom)?;
    if written == text.as_str() {
        Ok(Some(value))
    } else {
        Err(D::Error::custom("is not a known value"))
    }
}

/// An integer within bounds, in query parameters or a request body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Number<const LEAST: u64, const MOST: u64>(u64);

impl<const LEAST: u64, const MOST: u64> Number<LEAST, MOST> {
    /// The smallest number within the bounds.
    pub(super) const LEAST: Self = Self(LEAST);

    pub(super) const fn get(self) -> u64 {
        self.0
    }
}

impl<const LEAST: u64, const MOST: u64> Serialize for Number<LEAST, MOST> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de, const LEAST: u64, const MOST: u64> Deserialize<'de> for Number<LEAST, MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_u64(Whole(LEAST, MOST)).map(Self)
    }
}

/// Decodes an integer within bounds. Accepts `10.0` for `10`, because JSON does not distinguish integers from floats.
struct Whole(u64, u64);

impl Visitor<'_> for Whole {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a whole number from {} to {}", self.0, self.1)
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<u64, E> {
        if (self.0..=self.1).contains(&number) {
            Ok(number)
        } else {
            Err(E::custom(format!(
                "must be a whole number from {} to {}",
                self.0, self.1
            )))
        }
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<u64, E> {
        // Reject fractions. Every integer within the bounds is exact as a float.
        let whole = format!("{number:.0}")
            .parse()
            .ok()
            .filter(|_| number.fract() == 0.0);
        self.visit_u64(whole.unwrap_or(u64::MAX))
    }
}

impl<const LEAST: u64, const MOST: u64> PartialSchema for Number<LEAST, MOST> {
    fn schema() -> RefOr<Schema> {
        let bound = |number: u64| usize::try_from(number).ok();
        ObjectBuilder::new()
            .schema_type(Type::Integer)
            .minimum(bound(LEAST))
            .maximum(bound(MOST))
            .into()
    }
}

impl<const LEAST: u64, const MOST: u64> ToSchema for Number<LEAST, MOST> {}

/// Maximum number of entries on a page of a list, as requested.
pub(super) type PageLimit = Number<1, 1000>;

/// Page size to use: the requested one, or 100.
pub(super) fn page_limit(given: Option<PageLimit>) -> Limit {
    // This cannot fail, because `PageLimit` and `Limit` have the same bounds.
    Limit::new(given.map_or(100, PageLimit::get)).unwrap_or_default()
}

/// A query parameter with a maximum length in characters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Text<const MOST: usize>(String);

impl<const MOST: usize> Text<MOST> {
    pub(super) fn into_inner(self) -> String {
        self.0
    }
}

impl<'de, const MOST: usize> Deserialize<'de> for Text<MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text.chars().count() <= MOST {
            Ok(Self(text))
        } else {
            Err(D::Error::custom(format!("must be at most {MOST} characters")))
        }
    }
}

impl<const MOST: usize> PartialSchema for Text<MOST> {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .max_length(Some(MOST))
            .into()
    }
}

impl<const MOST: usize> ToSchema for Text<MOST> {}
