//! Session with Keystone v3 (OpenStack's identity service): a token, and Nova's address from the service catalogue. It
//! is renewed before the token expires and when the token is refused.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

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

/// Maximum size of Keystone's answer, most of which is the catalogue.
const MAX_ANSWER: usize = 8 << 20;
/// Version of Nova's API that is added to an address without one. All releases since OpenStack Kilo (2015) have it.
const COMPUTE_VERSION: &str = "v2.1";
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
        let answer = http.send(request, MAX_ANSWER).await?;
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
            Some(url) => url.as_str(),
            None => self.compute_of(&body.token.catalog)?,
        };
        Ok(Session {
            token,
            compute: with_version(compute),
            renew_at: Instant::now() + life.saturating_sub(RENEW_BEFORE_EXPIRY.min(life / 4)),
        })
    }

    /// The address of Nova in the catalogue. Several regions without a setting that names one are an error, because an
    /// arbitrary region would hide the VMs of the others.
    fn compute_of<'a>(&self, catalog: &'a [CatalogService]) -> Result<&'a str, DriverError> {
        let NovaSettings {
            region, interface, ..
        } = &self.settings;
        let endpoints = catalog
            .iter()
            .filter(|service| service.kind == "compute")
            .flat_map(|service| &service.endpoints)
            .filter(|endpoint| endpoint.interface == *interface);
        let regions: BTreeSet<_> = endpoints
            .clone()
            .filter_map(|found| found.region_id.as_deref())
            .collect();
        let is_unique = regions.len() < 2;
        let regions = regions.into_iter().collect::<Vec<_>>().join(", ");
        let Some(region) = region else {
            if !is_unique {
                return Err(DriverError::Rejected(format!(
                    "the cloud has several regions: {regions}; set region in the settings of the cloud"
                )));
            }
            let first = endpoints.map(|endpoint| endpoint.url.as_str()).next();
            return first.ok_or_else(|| {
                let problem =
                    format!("the catalogue of Keystone has no {interface} endpoint of a compute service");
                DriverError::Rejected(problem)
            });
        };
        let mut fitting = endpoints.filter(|endpoint| endpoint.region_id.as_ref() == Some(region));
        let found = fitting.next().map(|endpoint| endpoint.url.as_str());
        found.ok_or_else(|| {
            DriverError::Rejected(format!(
                "the catalogue of Keystone has no {interface} endpoint of a compute service in the region {region}; \
                 its regions: {regions}"
            ))
        })
    }
}

/// Adds the version of Nova's API to its address, unless the address has one. Catalogues may name the root of the service.
fn with_version(url: &str) -> String {
    let url = url.trim_end_matches('/');
    let is_version = |part: &str| {
        part.strip_prefix('v')
            .is_some_and(|version| version.starts_with(|first: char| first.is_ascii_digit()))
    };
    // The first three parts are the scheme, an empty part and the host.
    if url.split('/').skip(3).any(is_version) {
        url.to_owned()
    } else {
        format!("{url}/{COMPUTE_VERSION}")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_is_added_to_address_of_nova_without_one() {
        for (url, expected) in [
            ("https://cloud:8774", "https://cloud:8774/v2.1"),
            ("https://cloud:8774/", "https://cloud:8774/v2.1"),
            ("https://v2/compute/", "https://v2/compute/v2.1"),
            ("https://cloud/compute/v2.1", "https://cloud/compute/v2.1"),
            ("https://cloud/v2.1/0123abcd/", "https://cloud/v2.1/0123abcd"),
            ("https://cloud/v2/0123abcd", "https://cloud/v2/0123abcd"),
        ] {
            assert_eq!(with_version(url), expected);
        }
    }
}
