//! A test client of the documented API of 2017.

use std::time::{Duration, Instant};

use reqwest::{Method, header};
use serde_json::{Value, json};

use crate::{PATIENCE, Replica};

/// The documented method codes.
pub mod codes {
    /// login
    pub const LOGIN: u32 = 458_753;
    /// getVMMonitoringProcData
    pub const PROCESSES: u32 = 611_711;
    /// getVMMonitoringData
    pub const VM: u32 = 611_611;
    /// getVMMonitoringProcByNameData
    pub const PROCESSES_BY_NAME: u32 = 611_712;
    /// startmonitor
    pub const START: u32 = 32_523;
}

/// A gateway of the stack, with an HTTP client.
#[derive(Debug)]
pub struct Gateway {
    /// The gateway's process.
    pub replica: Replica,
    url: String,
    http: reqwest::Client,
}

/// A gateway's answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The HTTP status.
    pub http: u16,
    /// The exact body.
    pub body: String,
    /// The header `Retry-After`.
    pub retry_after: Option<String>,
    /// The header `Content-Type`.
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
                .expect("a plain HTTP client"),
        }
    }

    /// The URL of a path.
    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.url)
    }

    /// Sends a request to the path of the documented API.
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

    /// Posts a body as the clients of 2017 do, with the content type of a form.
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

    /// Queries rows and returns them as JSON objects.
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
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("not JSON ({error}): {self:?}"))
    }

    /// The envelope's `status_code`.
    pub fn status(&self) -> u64 {
        self.json()["status_code"]
            .as_u64()
            .unwrap_or_else(|| panic!("no status_code: {self:?}"))
    }

    /// The envelope's `message`.
    pub fn message(&self) -> String {
        let message = self.json()["message"].as_str().map(str::to_owned);
        message.unwrap_or_else(|| panic!("no message: {self:?}"))
    }
}

/// The exact body of an error answer of a method whose answers contain `data`.
pub fn failure(status: u32, method: &Value, session: &str, message: &str) -> String {
    format!(
        r#"{{"status_code":{status},"session_id":{session},"message_id":"","message":{message},"data":null,"method":{method}}}"#,
        session = json!(session),
        message = json!(message),
    )
}
