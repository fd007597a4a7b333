//! Records of requests that a service refused because the user may not make them. One user causes a bounded number.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use vmwatch_api::{
    Service,
    audit::{AuditRecord, AuditResult},
    time::unix_millis,
};

use super::{Audit, action, flood::Flood};
use crate::random_id;

/// Each target of a refused batch, at most 100, has a record of its own. Beyond that, a user causes ten records a minute.
const PERIOD: Duration = Duration::from_mins(10);
const ONE_BY_ONE: u32 = 100;
/// How often periods that are over are looked for.
const INTERVAL: Duration = Duration::from_secs(10);

/// The refusals of one service's replica.
#[derive(Debug)]
pub struct Refusals {
    audit: Audit,
    service: Service,
    flood: Flood,
}

impl Refusals {
    /// Appends to this audit.
    pub fn new(audit: Audit, service: Service) -> Self {
        Self {
            audit,
            service,
            flood: Flood::new(PERIOD, ONE_BY_ONE),
        }
    }

    /// Appends a record, or counts it if its user has caused enough of them.
    pub async fn record(&self, record: &AuditRecord, once: &str) {
        if self.flood.admits(&record.user) {
            self.audit.end(record, once).await;
        }
    }

    /// Appends the number of the counted refusals of each user whose period is over, until shutdown.
    pub async fn run(&self, shutdown: CancellationToken) {
        while shutdown
            .run_until_cancelled(tokio::time::sleep(INTERVAL))
            .await
            .is_some()
        {
            self.append_counted(false).await;
        }
    }

    /// Appends the numbers of all users, for a service that ends.
    pub async fn finish(&self) {
        self.append_counted(true).await;
    }

    async fn append_counted(&self, all: bool) {
        for (user, more) in self.flood.take(all) {
            let record = AuditRecord {
                at_ms: unix_millis(),
                action: action(self.service, "refused"),
                user,
                source: None,
                target: None,
                request_id: random_id(),
                operation_id: None,
                result: AuditResult::Refused,
                detail: format!("{more} more refused requests of this user within about ten minutes"),
            };
            self.audit.end(&record, &record.request_id).await;
        }
    }
}
