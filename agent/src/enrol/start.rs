//! Decides at the start of the agent how it connects to NATS. An agent that is not enrolled waits here.

use std::{path::Path, time::Duration};

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use vmwatch_api::{InstanceId, time::unix_millis};
use vmwatch_bus::{BusSettings, EnrolledKey};
use vmwatch_service::jitter::jittered;

use super::{
    EnrolError, Request, clone,
    identity::{Identity, IdentityError},
    platform, read_ca_file, read_token,
};
use crate::{
    config::{EnrolmentSettings, Gateway, Login, Timing, product_uuid},
    sample::Roots,
    status::Status,
};

/// Wait after the first failed enrolment. It doubles with each further failure that may be temporary, up to [`MAX`].
const FIRST: Duration = Duration::from_secs(2);
const MAX: Duration = Duration::from_mins(1);
/// Wait after a failure that an administrator has to resolve.
const REFUSED: Duration = Duration::from_mins(5);
/// Interval between checks whether an administrator has enrolled the VM.
const CHECK: Duration = Duration::from_secs(2);

/// The agent cannot start with its identity.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("the identity and the samples of the VM that this VM is a clone of cannot be set aside ({0})")]
    Clone(#[source] std::io::Error),
    #[error("{0}")]
    Settings(String),
}

/// How the agent connects to NATS, and what it reports.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) bus: BusSettings,
    pub(crate) instance_id: InstanceId,
    pub(crate) timing: Timing,
}

/// Returns how to connect; `None` if the agent was stopped before it was enrolled.
pub(crate) async fn connection(
    login: Login,
    spool: &Path,
    roots: &Roots,
    status: &Status,
    shutdown: &CancellationToken,
) -> Result<Option<Connection>, StartError> {
    let settings = match login {
        Login::Static(connection) => return Ok(Some(connection)),
        Login::Enrolment(settings) => settings,
    };
    let start = Start {
        settings,
        spool,
        roots,
        status,
    };
    tokio::select! {
        identity = start.identity() => start.connection(identity?).map(Some),
        () = shutdown.cancelled() => Ok(None),
    }
}

struct Start<'a> {
    settings: EnrolmentSettings,
    spool: &'a Path,
    roots: &'a Roots,
    status: &'a Status,
}

impl Start<'_> {
    fn connection(&self, identity: Identity) -> Result<Connection, StartError> {
        let Identity { record, key, ca_file } = identity;
        let enrolled = &record.answer;
        if let Some(set) = self
            .settings
            .instance_id
            .as_ref()
            .filter(|set| **set != record.instance_id)
        {
            return Err(StartError::Settings(format!(
                "VMWATCH_INSTANCE_ID is {set}, but this VM is enrolled as {}; remove the setting, or enrol the VM again",
                record.instance_id
            )));
        }
        let timing = self.settings.timing.or(enrolled).map_err(StartError::Settings)?;
        let key = EnrolledKey {
            public_key: key.public().to_string(),
            seed: key.into_seed(),
        };
        let urls = enrolled.nats_urls.clone();
        Ok(Connection {
            bus: BusSettings::enrolled(urls, key, ca_file, self.settings.ping_interval),
            instance_id: record.instance_id,
            timing,
        })
    }

    /// Waits for an identity that belongs to this VM.
    async fn identity(&self) -> Result<Identity, StartError> {
        let dir = &self.settings.dir;
        let mut failures = 0;
        loop {
            if let Some(identity) = dir.load()? {
                let recorded = identity.record.platform.as_ref();
                let Some((recorded, now)) =
                    recorded.and_then(|recorded| Some((recorded, platform::changed(recorded, self.roots)?)))
                else {
                    return Ok(identity);
                };
                warn!(
                    recorded = recorded.as_str(),
                    now = now.as_str(),
                    "this VM is a clone of the VM that was enrolled; set aside key and samples of that VM"
                );
                let time = unix_millis() / 1000;
                clone::set_aside(dir, self.spool, recorded, &now, time).map_err(StartError::Clone)?;
            }
            let Some(gateway) = &self.settings.gateway else {
                self.wait_without_gateway().await;
                continue;
            };
            if let Err(error) = self.enrol(gateway).await {
                failures += 1;
                self.wait(wait_after(&error, failures), format!("not enrolled: {error}"))
                    .await;
            }
        }
    }

    async fn wait_without_gateway(&self) {
        let why = clone::recorded_reason(&self.settings.dir);
        let why = why.unwrap_or_else(|| "this VM has no identity".to_owned());
        let reason =
            format!("not enrolled: {why}; run as root: vmwatch-agent enroll --gateway URL --token-file FILE");
        self.wait(Duration::MAX, reason).await;
    }

    /// Waits until the time has passed, or an administrator has enrolled the VM.
    async fn wait(&self, wait: Duration, reason: String) {
        warn!("{reason}");
        self.status.starting(Some(reason));
        let started = Instant::now();
        while started.elapsed() < wait && !self.settings.dir.is_enrolled() {
            sleep(CHECK.min(wait)).await;
        }
        self.status.starting(None);
    }

    async fn enrol(&self, gateway: &Gateway) -> Result<(), EnrolError> {
        let request = Request {
            gateway: gateway.url.clone(),
            ca_file: gateway.ca_file.as_deref().map(read_ca_file).transpose()?,
            token: read_token(&gateway.token_file)?,
            instance_id: match &self.settings.instance_id {
                Some(id) => id.clone(),
                None => product_uuid(&self.roots.sys).map_err(EnrolError::Usage)?,
            },
            platform: platform::read(self.roots),
        };
        let enrolment = super::enrol(request, &self.settings.dir).await?;
        if let Some(warning) = enrolment.clock_warning {
            warn!("{warning}");
        }
        let record = enrolment.record;
        info!(instance_id = %record.instance_id, public_key = %record.public_key, "enrolled");
        Ok(())
    }
}

/// The wait is random within limits, so that agents which wait for the same gateway do not all try at once.
fn wait_after(error: &EnrolError, failures: u32) -> Duration {
    // The exponent is limited to avoid an arithmetic overflow.
    let doubled = MAX.min(FIRST * 2_u32.pow(failures.saturating_sub(1).min(10)));
    match error {
        EnrolError::Throttled { wait, .. } => jittered((*wait).clamp(FIRST, REFUSED) * 2, 0.5),
        error if error.is_temporary() => jittered(doubled, 0.5),
        _ => jittered(REFUSED, 0.5),
    }
}
