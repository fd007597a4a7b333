//! Driver for the VMs of an OpenStack cloud, through Nova's REST API.
//!
//! When Nova accepts an action (202), it only promises to try; the state of the server shows the result. A conflict
//! (409) may mean that the server already is, or soon will be, in the wanted state; the caller reads the state to find
//! out.

mod http;
mod identity;
mod server;
mod settings;

use ::http::{HeaderName, Method, Request, StatusCode, header::CONTENT_TYPE};
use async_trait::async_trait;
use domain_stats::DomainStats;
use http_body_util::Full;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::{Instant, timeout, timeout_at},
};
use vmwatch_api::InstanceId;

pub(crate) use self::{http::TlsError, settings::NovaSettings};
use self::{
    http::{Answer, Http},
    identity::Identity,
    server::{ActionEntry, Actions, OneAction, OneServer, Page, Server, labels_of, state_of},
};
use super::{Driver, DriverError, Found, MAX_LISTED, NO_PERMIT, VmState, one_line};
use crate::{config::CallLimits, fence::Fence};

const AUTH_TOKEN: HeaderName = HeaderName::from_static("x-auth-token");
const API_VERSION: HeaderName = HeaderName::from_static("openstack-api-version");
/// First version of Nova's API that shows the reason of a failed action to users other than administrators.
const VERSION_WITH_DETAILS: &str = "compute 2.84";
/// Version of Nova's API for reading servers, that of OpenStack Newton (2016). Servers have `host_status` since 2.16 and
/// tags since 2.26.
const VERSION_OF_SERVERS: &str = "compute 2.26";
/// Default of Nova's maximum page size.
const PAGE_SIZE: usize = 1000;
/// Maximum size of an answer. A server has about 3 KiB, but may have much more metadata.
const MAX_ANSWER: usize = 8 << 20;
const MAX_PAGE: usize = 32 << 20;

/// Driver for one OpenStack cloud.
#[derive(Debug)]
pub(super) struct Nova {
    http: Http,
    identity: Identity,
    all_projects: bool,
    limits: CallLimits,
    permits: Semaphore,
    /// The only permit for listing servers. It is separate from the permits of actions, so that lists do not delay
    /// actions.
    list_permit: Semaphore,
}

impl Nova {
    pub(super) fn new(settings: NovaSettings, limits: CallLimits) -> Result<Self, TlsError> {
        Ok(Self {
            http: Http::new(settings.ca.as_deref())?,
            all_projects: settings.all_projects,
            identity: Identity::new(settings),
            limits,
            permits: Semaphore::new(limits.at_once),
            list_permit: Semaphore::new(1),
        })
    }

    /// Runs several requests to Nova as one driver call, within the limits of one call.
    async fn within<T>(&self, work: impl Future<Output = Result<T, DriverError>>) -> Result<T, DriverError> {
        let end = Instant::now() + self.limits.timeout;
        let _permit = permit_until(end, &self.permits).await?;
        timeout_at(end, work).await.map_err(|_| DriverError::Timeout)?
    }

    /// Sends a request to Nova. If Nova refuses the token, gets a new token and sends the request again. That is safe,
    /// because a request with a refused token has no effect. `may_begin` is called before each attempt.
    async fn request(
        &self,
        build: impl Fn(&identity::Session) -> Result<Request<Full<bytes::Bytes>>, DriverError>,
        may_begin: impl Fn() -> Result<(), DriverError>,
        max_answer: usize,
    ) -> Result<Answer, DriverError> {
        let session = self.identity.session(&self.http).await?;
        may_begin()?;
        let answer = self.http.send(build(&session)?, max_answer).await?;
        if answer.status != StatusCode::UNAUTHORIZED {
            return check_status(answer);
        }
        self.identity.forget(&session).await;
        let session = self.identity.session(&self.http).await?;
        may_begin()?;
        check_status(self.http.send(build(&session)?, max_answer).await?)
    }

    async fn read(&self, path: &str, version: Option<&str>) -> Result<Answer, DriverError> {
        self.read_up_to(MAX_ANSWER, path, version).await
    }

    async fn read_up_to(
        &self,
        max_answer: usize,
        path: &str,
        version: Option<&str>,
    ) -> Result<Answer, DriverError> {
        self.request(
            |session| build_request(session, &Method::GET, path, version, None),
            || Ok(()),
            max_answer,
        )
        .await
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, DriverError> {
        decode(&self.read(path, None).await?)
    }

    async fn server(&self, id: &InstanceId) -> Result<Server, DriverError> {
        let answer = self
            .read(&format!("/servers/{id}"), Some(VERSION_OF_SERVERS))
            .await?;
        let server = decode::<OneServer>(&answer)?.server;
        if server.is_deleted() {
            return Err(DriverError::NotFound);
        }
        Ok(server)
    }

    async fn act(&self, id: &InstanceId, action: &Value, fence: &Fence) -> Result<(), DriverError> {
        let path = format!("/servers/{id}/action");
        let posted = self.request(
            |session| build_request(session, &Method::POST, &path, None, Some(action)),
            || fence.check(),
            MAX_ANSWER,
        );
        posted.await.map(drop)
    }

    /// Returns why the last action on the server failed; `None` if it did not fail.
    async fn last_failure(&self, id: &InstanceId) -> Result<Option<String>, DriverError> {
        let path = format!("/servers/{id}/os-instance-actions");
        let newest = self.get::<Actions>(&path).await?.actions.into_iter().next();
        let Some(ActionEntry {
            action,
            request_id,
            message: Some(message),
            ..
        }) = newest
        else {
            return Ok(None);
        };
        let path = format!("{path}/{request_id}");
        let whole = self.read(&path, Some(VERSION_WITH_DETAILS)).await;
        let details = whole
            .and_then(|answer| decode::<OneAction>(&answer))
            .ok()
            .and_then(|whole| whole.action.events.into_iter().find_map(|event| event.details));
        Ok(Some(one_line(&format!(
            "{action}: {}",
            details.unwrap_or(message)
        ))))
    }

    /// Lists all servers. Each page has the time limit of one call, so that a large cloud can be listed; the number of
    /// pages is limited by [`MAX_LISTED`].
    async fn all_servers(&self) -> Result<Vec<Found>, DriverError> {
        let _permit = permit_until(Instant::now() + self.limits.timeout, &self.list_permit).await?;
        let mut found = Vec::new();
        let mut listed = 0;
        let mut marker = String::new();
        loop {
            let all = if self.all_projects { "&all_tenants=1" } else { "" };
            let path = format!("/servers/detail?limit={PAGE_SIZE}{all}{marker}");
            let reading = self.read_up_to(MAX_PAGE, &path, Some(VERSION_OF_SERVERS));
            let answer = timeout(self.limits.timeout, reading).await;
            let page: Page = decode(&answer.map_err(|_| DriverError::Timeout)??)?;
            let Some(last) = page.servers.last() else {
                return Ok(found);
            };
            listed += page.servers.len();
            marker = format!("&marker={}", last.id);
            found.extend(page.servers.iter().filter_map(|server| {
                Some(Found {
                    id: server.id.parse().ok()?,
                    name: server.name.clone(),
                    state: state_of(server),
                    labels: Some(labels_of(server)),
                })
            }));
            found.truncate(MAX_LISTED);
            if page.servers_links.is_empty() || listed >= MAX_LISTED {
                return Ok(found);
            }
        }
    }
}

#[async_trait]
impl Driver for Nova {
    async fn check(&self) -> Result<(), DriverError> {
        self.within(async { self.get::<Value>("/servers?limit=1").await.map(drop) })
            .await
    }

    async fn state(&self, id: &InstanceId) -> Result<VmState, DriverError> {
        self.within(async { Ok(state_of(&self.server(id).await?)) }).await
    }

    async fn failure_reason(&self, id: &InstanceId) -> Result<Option<String>, DriverError> {
        self.within(async {
            match self.server(id).await?.fault {
                Some(fault) => Ok(Some(one_line(&fault.message))),
                None => self.last_failure(id).await,
            }
        })
        .await
    }

    async fn start(&self, id: &InstanceId, fence: &Fence) -> Result<(), DriverError> {
        self.within(async {
            let server = self.server(id).await?;
            let action = match server.status.as_str() {
                "PAUSED" => json!({"unpause": null}),
                "SUSPENDED" => json!({"resume": null}),
                _ if server.is_shelved() => json!({"unshelve": null}),
                _ => json!({"os-start": null}),
            };
            self.act(id, &action, fence).await
        })
        .await
    }

    async fn shutdown(&self, id: &InstanceId, fence: &Fence) -> Result<(), DriverError> {
        self.within(self.act(id, &json!({"os-stop": null}), fence)).await
    }

    async fn reboot(&self, id: &InstanceId, hard: bool, fence: &Fence) -> Result<(), DriverError> {
        let kind = if hard { "HARD" } else { "SOFT" };
        self.within(self.act(id, &json!({"reboot": {"type": kind}}), fence))
            .await
    }

    /// Powers the server off with Nova's only stop action, which first asks the guest to shut down and cuts the power
    /// after `shutdown_timeout` (one minute by default).
    async fn destroy(&self, id: &InstanceId, fence: &Fence) -> Result<(), DriverError> {
        self.shutdown(id, fence).await
    }

    async fn list(&self) -> Result<Vec<Found>, DriverError> {
        self.all_servers().await
    }

    /// Nova gives no counters: what `/servers/ID/diagnostics` contains depends on the hypervisor, and it takes a call
    /// per server.
    async fn stats(&self) -> Result<Vec<(InstanceId, DomainStats)>, DriverError> {
        Ok(Vec::new())
    }
}

/// Waits for a permit until this time.
async fn permit_until(end: Instant, permits: &Semaphore) -> Result<SemaphorePermit<'_>, DriverError> {
    timeout_at(end, permits.acquire())
        .await
        .map_err(|_| NO_PERMIT)?
        .map_err(|closed| DriverError::Unavailable(closed.to_string()))
}

fn build_request(
    session: &identity::Session,
    method: &Method,
    path: &str,
    version: Option<&str>,
    body: Option<&Value>,
) -> Result<Request<Full<bytes::Bytes>>, DriverError> {
    let mut request = Request::builder()
        .method(method)
        .uri(format!("{}{path}", session.compute))
        .header(AUTH_TOKEN, &session.token)
        .header(CONTENT_TYPE, "application/json");
    if let Some(version) = version {
        request = request.header(API_VERSION, version);
    }
    request
        .body(body.map_or_else(Full::default, identity::json_body))
        .map_err(|error| {
            DriverError::Rejected(format!(
                "Nova's address in the service catalogue is invalid: {error}"
            ))
        })
}

/// Returns the answer if its status is a success, otherwise the error that the status stands for.
fn check_status(answer: Answer) -> Result<Answer, DriverError> {
    match answer.status {
        status if status.is_success() => Ok(answer),
        StatusCode::NOT_FOUND => Err(DriverError::NotFound),
        StatusCode::CONFLICT => Err(DriverError::Conflict(error_message(&answer))),
        StatusCode::TOO_MANY_REQUESTS => Err(DriverError::Unavailable(error_message(&answer))),
        status if status.is_server_error() => Err(DriverError::Unavailable(error_message(&answer))),
        _ => Err(DriverError::Rejected(error_message(&answer))),
    }
}

fn decode<T: DeserializeOwned>(answer: &Answer) -> Result<T, DriverError> {
    serde_json::from_slice(&answer.body)
        .map_err(|error| DriverError::Rejected(format!("Nova's answer could not be decoded: {error}")))
}

/// Message of an error answer, which OpenStack wraps as `{"conflictingRequest": {"code": 409, "message": "…"}}`.
fn error_message(answer: &Answer) -> String {
    let body: Option<Value> = serde_json::from_slice(&answer.body).ok();
    let message = body
        .as_ref()
        .and_then(Value::as_object)
        .and_then(|faults| faults.values().find_map(|fault| fault.get("message")?.as_str()));
    message.map_or_else(|| format!("HTTP status {}", answer.status), one_line)
}
