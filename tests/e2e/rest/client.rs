//! A client of the REST API, and helpers that publish samples for tests of it.

use std::{
    net::{IpAddr, Ipv4Addr},
    process::Command,
    time::{Duration, UNIX_EPOCH},
};

use async_nats::jetstream::message::PublishMessage;
use reqwest::{Method, RequestBuilder, header::HeaderMap};
use serde_json::{Value, json};
use testkit::{Gateway, PATIENCE, Program, Stack, StackBuilder, eventually};
use vmwatch_api::{
    Role, Scope,
    metrics::{CONTENT_TYPE, ProcessSample, SAMPLE_SUBJECT_PREFIX, Sample, SystemSample, VmSample},
    time::{CreateDate, unix_millis},
};
use vmwatch_blocks::{Encoder, SAMPLE_CONTENT_TYPE};

/// A client of one gateway, with or without a session.
#[derive(Debug, Clone)]
pub(crate) struct Api {
    http: reqwest::Client,
    base: String,
    pub(crate) token: Option<String>,
}

/// The gateway's answer to a request.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
}

/// Runs a program without blocking the Tokio runtime and prints its output. Returns whether it succeeded, and its
/// standard output.
pub(crate) async fn shown(mut command: Command) -> (bool, String) {
    let output = tokio::task::spawn_blocking(move || command.output());
    let output = output.await.unwrap().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    println!("{text}{}", String::from_utf8_lossy(&output.stderr));
    (output.status.success(), text)
}

impl Api {
    /// Returns a client without a session.
    pub(crate) fn of(gateway: &Gateway) -> Self {
        let http = reqwest::Client::builder()
            .timeout(PATIENCE)
            .redirect(reqwest::redirect::Policy::none());
        Self {
            http: http.build().expect("a plain HTTP client"),
            base: gateway.url(""),
            token: None,
        }
    }

    /// Returns a client without a session that connects from this loopback address.
    pub(crate) fn from_address(gateway: &Gateway, address: Ipv4Addr) -> Self {
        let http = reqwest::Client::builder()
            .timeout(PATIENCE)
            .local_address(IpAddr::V4(address));
        Self {
            http: http.build().expect("a plain HTTP client"),
            ..Self::of(gateway)
        }
    }

    /// Returns a client of the first gateway, with a session of this role and scope.
    pub(crate) async fn with(stack: &Stack, role: Role, scope: Scope) -> Self {
        let token = stack.session(role, scope).await;
        Self::of(stack.gateway(0)).holding(&token)
    }

    /// Returns the same client with another session.
    pub(crate) fn holding(&self, token: &str) -> Self {
        Self {
            token: Some(token.to_owned()),
            ..self.clone()
        }
    }

    /// Waits until the session is invalid. Fails after one second, because vmwatch promises that a session ends within
    /// this time.
    pub(crate) async fn is_over(&self) {
        eventually("the session is invalid", Duration::from_secs(1), async || {
            let reply = self.get("/me").await;
            let over = reply.status == 401;
            over.then_some(()).ok_or_else(|| format!("{reply:?}"))
        })
        .await;
    }

    /// Waits until requests with this credential are answered with this status.
    pub(crate) async fn answers(&self, what: &str, status: u16) {
        eventually(what, PATIENCE, async || {
            let reply = self.get("/me").await;
            (reply.status == status)
                .then_some(())
                .ok_or_else(|| format!("{reply:?}"))
        })
        .await;
    }

    /// Waits until the request fails with 503. NATS may still send requests to a process killed a moment ago; these
    /// time out with 504.
    pub(crate) async fn becomes_unavailable(&self, path: &str) {
        let reply = eventually("the request fails at once", PATIENCE, async || {
            let reply = self.get(path).await;
            if reply.status == 504 {
                Err(format!("{reply:?}"))
            } else {
                Ok(reply)
            }
        })
        .await;
        reply.problem(503, "unavailable");
    }

    /// Returns a client of another gateway with the same session.
    pub(crate) fn at(&self, gateway: &Gateway) -> Self {
        self.at_url(&gateway.url(""))
    }

    /// Returns a client with the same session that sends its requests to another address, such as that of a proxy.
    pub(crate) fn at_url(&self, base: &str) -> Self {
        Self {
            base: base.to_owned(),
            ..self.clone()
        }
    }

    /// Starts a request to a path below `/api/v1`.
    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.raw(method, &format!("/api/v1{path}"))
    }

    /// Starts a request to any path.
    pub(crate) fn raw(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.base));
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        Reply::of(self.request(Method::GET, path)).await
    }

    pub(crate) async fn send(&self, method: Method, path: &str, body: Value) -> Reply {
        Reply::of(self.request(method, path).json(&body)).await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> Reply {
        self.send(Method::POST, path, body).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Reply {
        Reply::of(self.request(Method::DELETE, path)).await
    }

    /// Returns the body of a GET request, which must succeed.
    pub(crate) async fn read(&self, path: &str) -> Value {
        let reply = self.get(path).await;
        assert_eq!(reply.status, 200, "{path}: {reply:?}");
        reply.json()
    }

    /// Logs in as this user and returns a client with the new session.
    pub(crate) async fn log_in(&self, user: &str, password: &str) -> Self {
        let body = json!({ "user_name": user, "password": password });
        let reply = self.post("/sessions", body).await;
        assert_eq!(reply.status, 201, "{reply:?}");
        self.holding(reply.json()["token"].as_str().expect("the answer has a token"))
    }
}

impl Reply {
    pub(crate) async fn of(request: RequestBuilder) -> Self {
        let response = request.send().await.expect("the gateway answers");
        Self {
            status: response.status().as_u16(),
            headers: response.headers().clone(),
            body: response.text().await.expect("the answer is complete"),
        }
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body)
            .unwrap_or_else(|error| panic!("the answer is not JSON ({error}): {self:?}"))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// Asserts that the answer is a complete problem document with this status and code. Returns its detail.
    pub(crate) fn problem(&self, status: u16, code: &str) -> String {
        let document = self.json();
        assert_eq!(
            (self.status, &document["code"]),
            (status, &json!(code)),
            "{self:?}"
        );
        assert_eq!(
            self.header("content-type"),
            Some("application/problem+json"),
            "{self:?}"
        );
        assert_eq!(document["status"], status, "{self:?}");
        assert_eq!(document["type"], "about:blank", "{self:?}");
        assert!(
            document["title"].as_str().is_some_and(|title| !title.is_empty()),
            "{self:?}"
        );
        assert_eq!(
            document["request_id"].as_str(),
            self.header("x-request-id"),
            "{self:?}"
        );
        let waits = matches!(status, 429 | 503);
        assert_eq!(self.header("retry-after").is_some(), waits, "{self:?}");
        document["detail"]
            .as_str()
            .expect("the problem document has a detail")
            .to_owned()
    }
}

/// Builds a test environment with the permissions of deploy/nats, in which lists and VM states are refreshed at short
/// intervals, and agents can enrol.
pub(crate) fn stack() -> StackBuilder {
    Stack::builder()
        .with_permissions()
        .without_rates()
        .set(
            Program::Auth,
            "VMWATCH_AGENT_NATS_URL",
            "tls://bus.example.com:4222",
        )
        .set(Program::Metrics, "VMWATCH_ROLLUP_INTERVAL", "200ms")
        .set(Program::Lifecycle, "VMWATCH_STATE_INTERVAL", "500ms")
}

/// Formats a time as the REST API does.
pub(crate) fn rfc3339(ms: u64) -> String {
    let date = CreateDate::at(UNIX_EPOCH + Duration::from_millis(ms), "+00:00".parse().unwrap());
    // The REST API has milliseconds, and rows have microseconds.
    format!("{}Z", &date.as_str()[..23])
}

/// Returns a sample of a VM.
pub(crate) fn sample(instance: &str, at_ms: u64, cpu_util: f64) -> Sample {
    let moment = UNIX_EPOCH + Duration::from_millis(at_ms);
    Sample {
        instance_id: instance.parse().unwrap(),
        create_date: CreateDate::at(moment, "+00:00".parse().unwrap()),
        part: 0,
        net_incoming: 1.5,
        net_outgoing: 0.5,
        vm_cpu: None,
        sums: Vec::new(),
        short_lived: None,
        filesystems: Vec::new(),
        vm: Some(VmSample {
            cpu_util: Some(cpu_util),
            mem: Some(20.0),
            disk_read: 3.0,
            disk_write: 4.0,
            proc: Some(2),
            // A kernel that does not report the other values.
            system: SystemSample {
                cores: Some(4),
                load: Some(1.25),
                pressure_cpu: Some(12.5),
                ..SystemSample::default()
            },
            ..VmSample::default()
        }),
        processes: Vec::new(),
    }
}

/// Returns a process of a sample.
pub(crate) fn process(cmd: &str, pid: u32, cpu_util: f64, started_ms: u64) -> ProcessSample {
    ProcessSample {
        cmd: cmd.to_owned(),
        pid,
        cpu_util,
        mem: 1.0,
        disk_read: 0.0,
        disk_write: 0.0,
        running_time: u32::try_from(started_ms / 1000).map_or(0.0, f64::from),
        ..ProcessSample::default()
    }
}

/// Publishes a sample, as an agent does.
pub(crate) async fn publish(stack: &Stack, sample: &Sample) {
    let subject = format!("{SAMPLE_SUBJECT_PREFIX}{}", sample.instance_id);
    for part in agent::split(sample.clone(), &mut Encoder::new().unwrap()).unwrap() {
        let message = PublishMessage::build().payload(part.body);
        let sent = stack
            .bus
            .jetstream_for_tests()
            .send_publish(subject.clone(), message.header(CONTENT_TYPE, SAMPLE_CONTENT_TYPE))
            .await;
        sent.expect("the bus accepts the sample")
            .await
            .expect("the stream acknowledges the sample");
    }
}

/// Publishes a current sample for each of these VMs, and waits until the VM list contains all of them.
pub(crate) async fn report(stack: &Stack, api: &Api, vms: &[(&str, f64)]) {
    for (instance, cpu) in vms {
        publish(stack, &sample(instance, unix_millis(), *cpu)).await;
    }
    eventually("the VM list contains all reported VMs", PATIENCE, async || {
        for (instance, _) in vms {
            let reply = api.get(&format!("/vms/{instance}")).await;
            if reply.status != 200 || reply.json()["sample"].is_null() {
                return Err(format!("{instance}: {reply:?}"));
            }
        }
        Ok(())
    })
    .await;
}
