//! A client of the REST API. It follows no redirects and uses no proxies, and reads bounded answers within a deadline.

use std::{error::Error, time::Duration};

use bytes::Bytes;
use http::{
    Method, Request, Response, StatusCode,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, RETRY_AFTER, USER_AGENT},
};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::time::timeout;

use crate::{
    connection::Connection,
    error::CliError,
    tls::{Http, http_client},
};

/// Time limit of a request. The gateway's own limits are shorter.
const DEADLINE: Duration = Duration::from_mins(1);
/// Maximum size of an answer. A page of the gateway has at most 768 KiB.
const MAX_ANSWER: usize = 16 << 20;
/// Items per page.
const PAGE: usize = 1000;
/// Characters that need no encoding in a query.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.');

/// The parameters of a query; those without a value are left out.
pub(crate) type Query<'a> = [(&'a str, Option<String>)];

#[derive(Debug)]
pub(crate) struct Client {
    http: Http,
    connection: Connection,
}

/// The items of all pages of a list that were read.
#[derive(Debug)]
pub(crate) struct List {
    /// The first answer, without its items.
    pub(crate) head: Value,
    pub(crate) items: Vec<Value>,
    /// Whether there are more items.
    pub(crate) has_more: bool,
}

/// The fields of a problem document (RFC 9457) that are shown.
#[derive(Debug, Deserialize)]
struct Problem {
    detail: String,
    request_id: Option<String>,
}

impl Client {
    pub(crate) fn new(connection: Connection) -> Result<Self, CliError> {
        let http = http_client(&connection.url, connection.ca_file.as_deref())?;
        Ok(Self { http, connection })
    }

    pub(crate) async fn get<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &Query<'_>,
    ) -> Result<T, CliError> {
        self.ask(Method::GET, &with_query(path, query), None).await
    }

    pub(crate) async fn post<T: DeserializeOwned>(&self, path: &str, body: &Value) -> Result<T, CliError> {
        self.ask(Method::POST, path, Some(body)).await
    }

    /// Sends a request that is answered without a body.
    pub(crate) async fn delete(&self, path: &str) -> Result<(), CliError> {
        self.send(Method::DELETE, path, None).await?;
        Ok(())
    }

    /// Reads all pages of a list, up to a number of items.
    pub(crate) async fn list(
        &self,
        path: &str,
        query: &Query<'_>,
        name: &str,
        limit: usize,
    ) -> Result<List, CliError> {
        let mut items: Vec<Value> = Vec::new();
        let (mut head, mut cursor) = (None, None);
        loop {
            let page = PAGE.min(limit.saturating_sub(items.len()));
            let mut query = query.to_vec();
            query.extend([("limit", Some(page.to_string())), ("cursor", cursor)]);
            let mut answer: Value = self.get(path, &query).await?;
            let Some(Value::Array(found)) = answer.get_mut(name).map(Value::take) else {
                return Err(CliError::Answer(format!("it has no list `{name}`")));
            };
            items.extend(found);
            items.truncate(limit);
            cursor = answer.get("next").and_then(Value::as_str).map(str::to_owned);
            let head = head.get_or_insert(answer);
            if cursor.is_none() || items.len() == limit {
                return Ok(List {
                    head: head.take(),
                    items,
                    has_more: cursor.is_some(),
                });
            }
        }
    }

    /// Begins to read the stream of live events.
    pub(crate) async fn open_stream(
        &self,
        query: &Query<'_>,
        last_event_id: Option<&str>,
    ) -> Result<Response<Incoming>, CliError> {
        let mut request = self.request(Method::GET, &with_query("/events", query))?;
        request = request.header(ACCEPT, "text/event-stream");
        if let Some(id) = last_event_id {
            request = request.header("Last-Event-ID", id);
        }
        let request = request
            .body(Full::default())
            .map_err(|error| self.invalid(&error))?;
        let response = self.within_deadline(self.http.request(request)).await?;
        let response = response.map_err(|error| self.unreachable(&error))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let (status, retry_after) = (response.status(), retry_after(&response));
        let body = self.body(response).await?;
        Err(self.problem(status, retry_after, &body))
    }

    /// The failure of a connection to the gateway.
    pub(crate) fn unreachable(&self, error: &(dyn Error + 'static)) -> CliError {
        let causes = std::iter::successors(Some(error), |&error| error.source());
        let mut reasons: Vec<String> = causes.map(ToString::to_string).collect();
        reasons.dedup();
        CliError::Unreachable {
            url: self.connection.url.to_string(),
            reason: reasons.join(": "),
        }
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<T, CliError> {
        let bytes = self.send(method, path, body).await?;
        serde_json::from_slice(&bytes).map_err(|error| CliError::Answer(error.to_string()))
    }

    async fn send(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Bytes, CliError> {
        let mut request = self.request(method, path)?;
        if body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        let body = body.map(|body| Full::from(body.to_string())).unwrap_or_default();
        let request = request.body(body).map_err(|error| self.invalid(&error))?;
        let exchange = async {
            let response = self
                .http
                .request(request)
                .await
                .map_err(|error| self.unreachable(&error))?;
            let (status, retry_after) = (response.status(), retry_after(&response));
            let body = self.body(response).await?;
            if status.is_success() {
                Ok(body)
            } else {
                Err(self.problem(status, retry_after, &body))
            }
        };
        self.within_deadline(exchange).await?
    }

    fn problem(&self, status: StatusCode, retry_after: Option<u64>, body: &[u8]) -> CliError {
        let mut problem = problem(status, retry_after, body);
        // The gateway's own text is for programs that call it.
        if let CliError::Problem {
            status: 401, detail, ..
        } = &mut problem
            && let Some(token) = &self.connection.token
        {
            token.refusal().clone_into(detail);
        }
        problem
    }

    /// The error if the gateway ends a stream because the token became invalid.
    pub(crate) fn token_ended(&self) -> CliError {
        self.problem(StatusCode::UNAUTHORIZED, None, &[])
    }

    fn request(&self, method: Method, path: &str) -> Result<http::request::Builder, CliError> {
        let request = Request::builder()
            .method(method)
            .uri(format!("{}/api/v1{path}", self.connection.url))
            .header(USER_AGENT, concat!("vmwatch/", env!("CARGO_PKG_VERSION")));
        Ok(match &self.connection.token {
            Some(token) => request.header(AUTHORIZATION, token.header()?),
            None => request,
        })
    }

    fn invalid(&self, error: &http::Error) -> CliError {
        CliError::Usage(format!(
            "the request to {} is invalid: {error}",
            self.connection.url
        ))
    }

    async fn within_deadline<T>(&self, work: impl Future<Output = T>) -> Result<T, CliError> {
        timeout(DEADLINE, work)
            .await
            .map_err(|_| CliError::Timeout(self.connection.url.to_string()))
    }

    async fn body(&self, response: Response<Incoming>) -> Result<Bytes, CliError> {
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        let body = body.map_err(|error| {
            if error.is::<LengthLimitError>() {
                CliError::Answer(format!("it has more than {MAX_ANSWER} bytes"))
            } else {
                self.unreachable(error.as_ref())
            }
        })?;
        Ok(body.to_bytes())
    }
}

fn retry_after(response: &Response<Incoming>) -> Option<u64> {
    response.headers().get(RETRY_AFTER)?.to_str().ok()?.parse().ok()
}

fn problem(status: StatusCode, retry_after: Option<u64>, body: &[u8]) -> CliError {
    let (detail, request_id) = match serde_json::from_slice::<Problem>(body) {
        Ok(problem) => (problem.detail, problem.request_id),
        // A proxy has answered, or the address is that of another server.
        Err(_) => (format!("the answer is {status}"), None),
    };
    CliError::Problem {
        status: status.as_u16(),
        detail,
        retry_after,
        request_id,
    }
}

fn with_query(path: &str, query: &Query<'_>) -> String {
    let given = query
        .iter()
        .filter_map(|(name, value)| Some((name, value.as_ref()?)));
    let pairs: Vec<String> = given
        .map(|(name, value)| format!("{name}={}", utf8_percent_encode(value, ENCODED)))
        .collect();
    if pairs.is_empty() {
        path.to_owned()
    } else {
        format!("{path}?{}", pairs.join("&"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_is_encoded_and_lacks_missing_parameters() {
        let query = [
            ("q", Some("a b&c=ü+".to_owned())),
            ("state", None),
            ("at", Some("2026-11-27T14:03:10.000Z".to_owned())),
        ];
        let encoded = "/vms?q=a%20b%26c%3D%C3%BC%2B&at=2026-11-27T14%3A03%3A10.000Z";
        assert_eq!(with_query("/vms", &query), encoded);
        assert_eq!(with_query("/vms", &[("q", None)]), "/vms");
    }

    #[test]
    fn answer_of_another_server_is_no_problem_document() {
        let error = problem(StatusCode::BAD_GATEWAY, None, b"<html>");
        assert_eq!(
            (error.to_string(), error.exit_code()),
            ("the answer is 502 Bad Gateway".to_owned(), 69)
        );
        let body = br#"{"type":"about:blank","title":"Not Found","status":404,"detail":"there is no VM","code":"not_found","request_id":"5e"}"#;
        let error = problem(StatusCode::NOT_FOUND, None, body);
        assert_eq!(
            (error.to_string(), error.exit_code()),
            ("there is no VM (request 5e)".to_owned(), 66)
        );
    }
}
