//! Session with Keystone v3 (OpenStack's identity service): a token, and Nova's address from the service catalogue. It
//! is renewed before the token expires and when the token is refused.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Request, StatusCode, header::CONTENT_TYPE};
use http_body_util::Full;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{sync::Mutex, time::Instant};
use tracing::{debug, info};

use super::{
    error_message,
    http::{Answer, Http},
    settings::{Login, NovaSettings},
};
use crate::driver::DriverError;

/// A token is renewed this long before it expires, or, if its lifetime is short, after three quarters of the lifetime.
const RENEW_BEFORE_EXPIRY: Duration = Duration::from_mins(5);

/// A Keystone token and the address of Nova.
#[derive(Debug)]
pub(super) struct Session {
    /// The token, marked as sensitive so that `Debug` does not show it.
    pub(super) token: HeaderValue,
    /// Address of Nova, without a trailing slash.
    pub(super) compute: String,
    renew_at: Instant,
}

/// The current Keystone session for one cloud.
#[derive(Debug)]
pub(super) struct Identity {
    settings: NovaSettings,
    current: Mutex<Option<Arc<Session>>>,
}

#[derive(Deserialize)]
struct Body {
    token: Token,
}

#[derive(Deserialize)]
struct Token {
    expires_at: Timestamp,
    #[serde(default)]
    catalog: Vec<CatalogService>,
}

#[derive(Deserialize)]
struct CatalogService {
    #[serde(rename = "type")]
    kind: String,
    endpoints: Vec<CatalogEndpoint>,
}

#[derive(Deserialize)]
struct CatalogEndpoint {
    interface: String,
    #[serde(default)]
    region_id: Option<String>,
    url: String,
}

impl Identity {
    pub(super) fn new(settings: NovaSettings) -> Self {
        Self {
            settings,
            current: Mutex::new(None),
        }
    }

    /// Returns a valid session. Of several concurrent callers one logs in, and the others wait for it.
    pub(super) async fn session(&self, http: &Http) -> Result<Arc<Session>, DriverError> {
        let mut current = self.current.lock().await;
        if let Some(session) = current
            .as_ref()
            .filter(|session| Instant::now() < session.renew_at)
        {
            return Ok(Arc::clone(session));
        }
        let session = Arc::new(self.log_in(http).await?);
        *current = Some(Arc::clone(&session));
        Ok(session)
    }

    /// Discards a session whose token was refused, unless it was replaced already.
    pub(super) async fn forget(&self, refused: &Arc<Session>) {
        let mut current = self.current.lock().await;
        if current
            .as_ref()
            .is_some_and(|session| Arc::ptr_eq(session, refused))
        {
            debug!(
                keystone = self.settings.auth_url,
                "Nova refused the Keystone token; logging in again"
            );
            *current = None;
        }
    }

    async fn log_in(&self, http: &Http) -> Result<Session, DriverError> {
        let body = Full::from(login_body(&self.settings.login).to_string());
        let request = Request::post(format!("{}/auth/tokens", self.settings.auth_url))
            .header(CONTENT_TYPE, "application/json")
            .body(body)
            .map_err(|error| DriverError::Rejected(format!("auth_url is not a valid address: {error}")))?;
        let answer = http.send(request).await?;
        match answer.status {
            StatusCode::CREATED => {
                info!(keystone = self.settings.auth_url, "logged in to Keystone");
                self.session_of(&answer)
            }
            StatusCode::UNAUTHORIZED => Err(DriverError::Rejected(
                "Keystone refused the credentials of this service".to_owned(),
            )),
            status if status.is_server_error() => Err(DriverError::Unavailable(error_message(&answer))),
            _ => Err(DriverError::Rejected(error_message(&answer))),
        }
    }

    fn session_of(&self, answer: &Answer) -> Result<Session, DriverError> {
        let missing = |what: &str| DriverError::Rejected(format!("Keystone's answer has no valid {what}"));
        let mut token = answer
            .headers
            .get("x-subject-token")
            .cloned()
            .ok_or_else(|| missing("token"))?;
        token.set_sensitive(true);
        let body: Body = serde_json::from_slice(&answer.body).map_err(|_| missing("body"))?;
        let life = body.token.expires_at.duration_since(Timestamp::now());
        let life = Duration::try_from(life).unwrap_or_default();
        let compute = match &self.settings.compute_url {
            Some(url) => url.clone(),
            None => self.compute_of(&body.token.catalog).ok_or_else(|| {
                let position = self.settings.region.as_deref().unwrap_or("any region");
                missing(&format!(
                    "{} endpoint of a compute service in {position}",
                    self.settings.interface
                ))
            })?,
        };
        Ok(Session {
            token,
            compute,
            renew_at: Instant::now() + life.saturating_sub(RENEW_BEFORE_EXPIRY.min(life / 4)),
        })
    }

    fn compute_of(&self, catalog: &[CatalogService]) -> Option<String> {
        let endpoints = catalog
            .iter()
            .filter(|service| service.kind == "compute")
            .flat_map(|service| &service.endpoints);
        let region = self.settings.region.as_ref();
        let mut fitting = endpoints.filter(|endpoint| {
            endpoint.interface == self.settings.interface
                && region.is_none_or(|region| endpoint.region_id.as_ref() == Some(region))
        });
        fitting
            .next()
            .map(|endpoint| endpoint.url.trim_end_matches('/').to_owned())
    }
}

fn login_body(login: &Login) -> Value {
    match login {
        Login::Password {
            user,
            user_domain,
            project,
            project_domain,
            password,
        } => json!({"auth": {
            "identity": {
                "methods": ["password"],
                "password": {"user": {
                    "name": user,
                    "domain": {"name": user_domain},
                    "password": password.reveal(),
                }},
            },
            "scope": {"project": {"name": project, "domain": {"name": project_domain}}},
        }}),
        // An application credential is bound to a project; Keystone refuses a request that also names a project.
        Login::ApplicationCredential { id, secret } => json!({"auth": {
            "identity": {
                "methods": ["application_credential"],
                "application_credential": {"id": id, "secret": secret.reveal()},
            },
        }}),
    }
}

/// Encodes a value as a JSON request body.
pub(super) fn json_body(value: &Value) -> Full<Bytes> {
    Full::from(value.to_string())
}
