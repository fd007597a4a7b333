//! Finds what explains each firing alert, and stores it with the alert.
//!
//! ```text
//! alert that is firing, without culprits
//!   └─ search: what explains this condition, in which time
//!        └─ fetch: metrics.process.top, metrics.process.at, lifecycle.operations
//!             └─ culprits, or why there are none ──> alert
//! ```
//!
//! Each alert gets an answer within [`LIMIT`], because its first notification waits for it.

mod fetch;
mod search;
#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use futures::{StreamExt, TryStreamExt, stream};
use metrics::{counter, histogram};
use mongodb::bson::{Document, deserialize_from_document, doc, serialize_to_bson};
use tokio::{
    sync::Notify,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use vmwatch_api::alerts::{Alert, culprits::Culprits};
use vmwatch_bus::Bus;

use self::{fetch::fetch, search::Window};
use crate::{
    AlertError,
    definitions::DefinitionsHandle,
    events::Events,
    store::{Store, StoredAlert},
};

/// Maximum time for finding the culprits of an alert.
const LIMIT: Duration = Duration::from_millis(1500);
/// Interval at which alerts without culprits are looked for, besides each time that an alert changes.
const INTERVAL: Duration = Duration::from_secs(2);
/// Maximum number of alerts that are read at once. Further ones are read when these have culprits.
const MAX_ALERTS: usize = 200;
/// Maximum number of alerts whose culprits are looked for at the same time. By default, metrics-svc serves two expensive
/// reads of one user at the same time.
const AT_ONCE: usize = 2;

/// Finds the culprits of alerts until shutdown. `changed` is notified when alerts have changed; this task notifies it as
/// well.
pub(crate) async fn run(
    bus: Bus,
    store: Store,
    definitions: DefinitionsHandle,
    changed: Arc<Notify>,
    shutdown: CancellationToken,
) {
    let finder = Finder {
        events: Events::new(&bus),
        bus,
        store,
        definitions,
    };
    let finding = async {
        loop {
            let mut notified = Box::pin(changed.notified());
            // A change during the pass must start another one.
            notified.as_mut().enable();
            match finder.pass(&changed).await {
                // There may be more alerts.
                Ok(MAX_ALERTS..) => continue,
                Ok(_) => {}
                Err(error) => warn!(%error, "finding the culprits of alerts failed; retrying"),
            }
            tokio::select! {
                () = notified => {}
                () = sleep(INTERVAL) => {}
            }
        }
    };
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = finding => {}
    }
}

struct Finder {
    events: Events,
    bus: Bus,
    store: Store,
    definitions: DefinitionsHandle,
}

impl Finder {
    /// Finds and stores the culprits of active alerts that have none. Returns the number of alerts that got culprits.
    async fn pass(&self, changed: &Notify) -> Result<usize, AlertError> {
        let alerts = self.without_culprits().await?;
        let finding = stream::iter(alerts).map(async |alert| {
            let culprits = self.find(&alert).await;
            let is_stored = self.store(&alert, &culprits).await?;
            if is_stored {
                let revision = alert.revision.saturating_add(1);
                let culprits = Some(culprits);
                let alert = Alert {
                    culprits,
                    revision,
                    ..alert
                };
                self.events.publish(&alert).await;
            }
            Ok::<_, AlertError>(is_stored)
        });
        let mut finding = Box::pin(finding.buffer_unordered(AT_ONCE));
        let mut count = 0;
        while let Some(is_stored) = finding.next().await {
            if is_stored? {
                count += 1;
                changed.notify_waiters();
            }
        }
        Ok(count)
    }

    /// Reads active alerts without culprits, the newest first, because their first notifications wait.
    async fn without_culprits(&self) -> Result<Vec<Alert>, AlertError> {
        let alerts = self.store.alerts.clone_with_type::<Document>();
        let filter = doc! {
            "open": true,
            "alert.culprits.to_ms": null,
            "alert.state": { "$in": ["firing", "acknowledged"] },
        };
        let found = alerts
            .find(filter)
            .sort(doc! { "alert.fired_ms": -1 })
            .limit(i64::try_from(MAX_ALERTS).unwrap_or(i64::MAX));
        let found: Vec<Document> = found.await?.try_collect().await?;
        let decoded = found.into_iter().filter_map(|document| {
            let stored: Result<StoredAlert, _> = deserialize_from_document(document);
            // A newer version may store what this version does not know; the engine of that version finds the culprits.
            let stored = stored.inspect_err(|error| debug!(%error, "an alert could not be decoded"));
            stored.ok().map(|stored| stored.alert)
        });
        Ok(decoded.collect())
    }

    /// Finds what explains an alert. If that fails, the answer says why.
    async fn find(&self, alert: &Alert) -> Culprits {
        let started = Instant::now();
        let definitions = self.definitions.current();
        let rule = definitions.rules.iter().find(|rule| rule.id == alert.rule_id);
        let window = Window::new(alert, rule.map_or(0, |rule| rule.spec.for_seconds));
        let found = timeout(LIMIT, fetch(&self.bus, alert, window)).await;
        let found = found.unwrap_or_else(|_| Culprits {
            problem: Some("the processes could not be read within 1.5 seconds".to_owned()),
            ..window.nothing()
        });
        histogram!("vmwatch_alert_culprits_seconds").record(started.elapsed().as_secs_f64());
        let result = if found.problem.is_some() {
            "problem"
        } else {
            "found"
        };
        counter!("vmwatch_alert_culprits_total", "result" => result).increment(1);
        found
    }

    /// Stores the culprits of an alert, unless the alert has changed meanwhile; then the next pass finds them again. Returns
    /// whether they were stored.
    async fn store(&self, alert: &Alert, culprits: &Culprits) -> Result<bool, AlertError> {
        let culprits = serialize_to_bson(culprits).map_err(mongodb::error::Error::custom)?;
        let revision = i64::try_from(alert.revision).unwrap_or(i64::MAX);
        let unchanged = doc! { "_id": alert.id.as_str(), "alert.revision": revision };
        let change = doc! { "$set": {
            "alert.culprits": culprits,
            "alert.revision": revision.saturating_add(1),
        } };
        let updated = self.store.alerts.update_one(unchanged, change).await?;
        Ok(updated.matched_count > 0)
    }
}
