//! Writes audit records about requests that a service refused because the user lacks permission. The number of records
//! per user is limited.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use vmwatch_api::{
    Service,
    audit::{AuditRecord, AuditResult},
    time::unix_millis,
};

use super::{Audit, action, flood::Flood};
use crate::random_id;

/// Period in which refusals are counted per user. The first 100 refusals in a period get one record each: enough for a
/// request on 100 VMs, the maximum, and ten records per minute on average.
const PERIOD: Duration = Duration::from_mins(10);
const ONE_BY_ONE: u32 = 100;
/// Interval between checks for expired counting periods.
const INTERVAL: Duration = Duration::from_secs(10);

/// Records the refused requests of one replica of a service in the audit.
#[derive(Debug)]
pub struct Refusals {
    audit: Audit,
    service: Service,
    flood: Flood,
}

impl Refusals {
    pub fn new(audit: Audit, service: Service) -> Self {
        Self {
            audit,
            service,
            flood: Flood::new(PERIOD, ONE_BY_ONE),
        }
    }

    /// Appends an audit record about a refused request, or only counts the refusal if the user has reached the limit.
    pub async fn record(&self, record: &AuditRecord, once: &str) {
        if self.flood.admits(&record.user) {
            self.audit.end(record, once).await;
        }
    }

    /// Until shutdown, appends the counts of refusals of users whose counting period has expired.
    pub async fn run(&self, shutdown: CancellationToken) {
        while shutdown
            .run_until_cancelled(tokio::time::sleep(INTERVAL))
            .await
            .is_some()
        {
            self.append_counted(false).await;
        }
    }

    /// Appends the counts of refusals of all users; called before the service stops.
    pub async fn finish(&self) {
        self.append_counted(true).await;
    }

    async fn append_counted(&self, all: bool) {
        for (user, more) in self.flood.take(all) {
            let record = AuditRecord {
                at_ms: unix_millis(),
                action: action(self.service, "refused"),
                user,
                api_token: None,
                source: None,
                target: None,
                request_id: random_id(),
                operation_id: None,
                result: AuditResult::Refused,
                detail: format!("{more} further refused requests of this user in about ten minutes"),
            };
            self.audit.end(&record, &record.request_id).await;
        }
    }
}
