//! A client of the documented API of 2017, for tests.

use std::time::{Duration, Instant};

use reqwest::{Method, header};
use serde_json::{Value, json};

use crate::{PATIENCE, Replica};

/// The method codes of the documented API.
pub mod codes {
    /// Code of the documented method `login`.
    pub const LOGIN: u32 = 458_753;
    /// Code of the documented method `getVMMonitoringProcData`.
    pub const PROCESSES: u32 = 611_711;
    /// Code of the documented method `getVMMonitoringData`.
    pub const VM: u32 = 611_611;
    /// Code of the documented method `getVMMonitoringProcByNameData`.
    pub const PROCESSES_BY_NAME: u32 = 611_712;
    /// Code of the documented method `startmonitor`.
    pub const START: u32 = 32_523;
}

/// A gateway of the test stack, with an HTTP client for it.
#[derive(Debug)]
pub struct Gateway {
    /// The gateway's process.
    pub replica: Replica,
    url: String,
    http: reqwest::Client,
}

/// A gateway's HTTP response.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The HTTP status code.
    pub http: u16,
    /// The response body, byte for byte.
    pub body: String,
    /// The value of the header `Retry-After`.
    pub retry_after: Option<String>,
    /// The value of the header `Content-Type`.
    pub content_type: Option<String>,
    /// Time from sending the request to receiving the last byte.
    pub took: Duration,
}

impl Gateway {
    pub(crate) fn new(replica: Replica, port: u16) -> Self {
        Self {
            replica,
            url: format!("http://127.0.0.1:{port}"),
            http: reqwest::Client::builder()
                .timeout(PATIENCE)
                .build()
                .expect("building an HTTP client without TLS succeeds"),
        }
    }

    /// The URL of a path on this gateway.
    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.url)
    }

    /// Sends a request to the URL path of the documented API.
    pub async fn send(
        &self,
        method: Method,
        content_type: Option<&str>,
        body: impl Into<reqwest::Body>,
    ) -> Result<Answer, reqwest::Error> {
        let started = Instant::now();
        let mut request = self.http.request(method, self.url("/wsgi_app.py")).body(body);
        if let Some(content_type) = content_type {
            request = request.header(header::CONTENT_TYPE, content_type);
        }
        let response = request.send().await?;
        let text = |name| {
            response
                .headers()
                .get(name)
                .and_then(|value| value.to_str().ok())
                .map(str::to_owned)
        };
        let (retry_after, content_type) = (text(header::RETRY_AFTER), text(header::CONTENT_TYPE));
        Ok(Answer {
            http: response.status().as_u16(),
            retry_after,
            content_type,
            body: response.text().await?,
            took: started.elapsed(),
        })
    }

    /// Posts a body with the content type of an HTML form, as the clients of 2017 do.
    pub async fn post_text(&self, body: impl Into<reqwest::Body>) -> Answer {
        self.send(Method::POST, Some("application/x-www-form-urlencoded"), body)
            .await
            .unwrap_or_else(|error| panic!("request to {} failed: {error:?}", self.url))
    }

    /// Posts a JSON request.
    pub async fn post(&self, request: &Value) -> Answer {
        self.post_text(request.to_string()).await
    }

    /// Logs in and returns the session token.
    pub async fn login(&self, user: &str, password: &str) -> String {
        let data = json!({ "user_name": user, "password": password });
        let answer = self.post(&json!({ "method": codes::LOGIN, "data": data })).await;
        let session = answer.json()["session_id"].as_str().map(str::to_owned);
        match session {
            Some(session) if answer.status() == 1 => session,
            _ => panic!("login as {user} failed: {answer:?}"),
        }
    }

    /// Queries rows of a VM and returns them as JSON objects.
    pub async fn rows(&self, session: &str, method: u32, limit: u32, data: Value) -> Vec<Value> {
        let request = json!({ "method": method, "session_id": session, "limit": limit, "format": "json", "data": data });
        let answer = self.post(&request).await;
        match answer.json()["data"].take() {
            Value::Array(rows) if answer.status() == 1 => rows,
            _ => panic!("query {request} failed: {answer:?}"),
        }
    }

    /// Requests the start of a VM.
    pub async fn start_vm(&self, session: &str, instance: &str) -> Answer {
        let data = json!({ "instance_id": instance });
        self.post(&json!({ "method": codes::START, "session_id": session, "data": data }))
            .await
    }
}

impl Answer {
    /// The response body, parsed as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("not JSON ({error}): {self:?}"))
    }

    /// The field `status_code` of the response body.
    pub fn status(&self) -> u64 {
        self.json()["status_code"]
            .as_u64()
            .unwrap_or_else(|| panic!("the response has no status_code: {self:?}"))
    }

    /// The field `message` of the response body.
    pub fn message(&self) -> String {
        let message = self.json()["message"].as_str().map(str::to_owned);
        message.unwrap_or_else(|| panic!("the response has no message: {self:?}"))
    }
}

/// The exact body of an error response, for methods whose responses have the field `data`.
pub fn failure(status: u32, method: &Value, session: &str, message: &str) -> String {
    format!(
        r#"{{"status_code":{status},"session_id":{session},"message_id":"","message":{message},"data":null,"method":{method}}}"#,
        session = json!(session),
        message = json!(message),
    )
}
