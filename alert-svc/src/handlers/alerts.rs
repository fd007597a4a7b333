//! Lists, reads and acknowledges alerts.

use std::{collections::BTreeMap, sync::Arc};

use futures::TryStreamExt;
use mongodb::bson::{Document, deserialize_from_document, doc, serialize_to_bson};
use serde::Deserialize;
use tracing::{Instrument, Span};
use vmwatch_api::{
    Scope,
    alerts::{Alert, AlertFilter, AlertPage, AlertPosition, AlertState, AlertsAcknowledge, RecordRef},
    first_page,
    time::unix_millis,
};
use vmwatch_bus::Context;
use vmwatch_store::command_span;

use super::{Handlers, changed_meanwhile, conflict, in_scope, not_found, scope_of};
use crate::{
    AlertError,
    store::{StoredAlert, signed},
};

/// Number of attempts to acknowledge an alert that changes at the same time.
const TRIES: u32 = 5;

/// The number of documents with the same value.
#[derive(Deserialize)]
pub(super) struct Count {
    #[serde(rename = "_id")]
    pub(super) id: String,
    pub(super) count: i64,
}

impl Handlers {
    /// Lists alerts, newest first.
    pub(super) async fn list_alerts(
        self: Arc<Self>,
        context: Context,
        filter: AlertFilter,
    ) -> Result<AlertPage, AlertError> {
        let scope = scope_of(&context);
        let limit = usize::from(filter.limit.get());
        // One more alert than requested is read to determine whether more follow.
        let found = self
            .store
            .alerts
            .find(selection(&filter, scope))
            .sort(doc! { "alert.since_ms": -1, "_id": 1 })
            .limit(i64::from(filter.limit.get()) + 1);
        let reading = async { found.await?.try_collect::<Vec<StoredAlert>>().await };
        let found = reading.instrument(self.span("find")).await?;
        let (alerts, more) = first_page(found.into_iter().map(|stored| stored.alert), limit);
        let next = alerts.last().filter(|_| more).map(|last| AlertPosition {
            since_ms: last.since_ms,
            id: last.id.clone(),
        });
        let rules = &self.definitions.current().rules;
        Ok(AlertPage {
            alerts,
            next,
            active: self.count_active("$alert.severity", scope).await?,
            has_recipients: rules
                .iter()
                .any(|rule| rule.spec.enabled && !rule.spec.recipients.is_empty()),
        })
    }

    /// Number of firing and acknowledged alerts in scope, by the value of a field.
    pub(super) async fn count_active(
        &self,
        field: &str,
        scope: &Scope,
    ) -> Result<BTreeMap<String, u64>, AlertError> {
        let active = [AlertState::Firing, AlertState::Acknowledged].map(AlertState::as_str);
        let mut filter = doc! { "open": true, "alert.state": { "$in": active.to_vec() } };
        filter.extend(in_scope(scope));
        let pipeline = [
            doc! { "$match": filter },
            doc! { "$group": { "_id": field, "count": { "$sum": 1 } } },
        ];
        let found = self.store.alerts.aggregate(pipeline);
        let reading = async { found.await?.try_collect::<Vec<Document>>().await };
        let counts = reading.instrument(self.span("aggregate")).await?;
        let counts = counts
            .into_iter()
            .filter_map(|count| deserialize_from_document::<Count>(count).ok());
        Ok(counts
            .map(|count| (count.id, u64::try_from(count.count).unwrap_or(0)))
            .collect())
    }

    /// Reads an alert that is in scope.
    pub(super) async fn get_alert(
        self: Arc<Self>,
        context: Context,
        alert: RecordRef,
    ) -> Result<Alert, AlertError> {
        Ok(self.find_alert(&context, &alert).await?.alert)
    }

    async fn find_alert(&self, context: &Context, alert: &RecordRef) -> Result<StoredAlert, AlertError> {
        let mut filter = doc! { "_id": alert.id.as_str() };
        filter.extend(in_scope(scope_of(context)));
        let reading = self.store.alerts.find_one(filter).into_future();
        let found = reading.instrument(self.span("find")).await?;
        found.ok_or_else(|| not_found("alert"))
    }

    /// The trace span of a command on the collection of alerts.
    fn span(&self, operation: &'static str) -> Span {
        command_span(operation, self.store.alerts.name())
    }

    /// Acknowledges a firing alert. If the alert changes at the same time, such as by a new value, the change is
    /// repeated.
    pub(super) async fn acknowledge_alert(
        self: Arc<Self>,
        context: Context,
        alert: RecordRef,
    ) -> Result<Alert, AlertError> {
        let found = self.find_alert(&context, &alert).await?;
        if found.alert.state == AlertState::Acknowledged {
            return Ok(found.alert);
        }
        check_state(&found.alert)?;
        let detail = described(&found.alert);
        let change = async {
            let mut found = found;
            for _ in 0..TRIES {
                if let Some(changed) = self.try_acknowledge(&context, found.alert).await? {
                    return Ok(changed);
                }
                found = self.find_alert(&context, &alert).await?;
                if found.alert.state == AlertState::Acknowledged {
                    return Ok(found.alert);
                }
                check_state(&found.alert)?;
            }
            Err(changed_meanwhile("alert"))
        };
        let change = Box::pin(self.audited::<AlertsAcknowledge, _>(&context, &alert.id, detail, change));
        let alert = change.await?;
        self.events.publish(&alert).await;
        Ok(alert)
    }

    /// Returns `None` if the alert was changed meanwhile.
    async fn try_acknowledge(&self, context: &Context, alert: Alert) -> Result<Option<Alert>, AlertError> {
        let unchanged = doc! { "_id": alert.id.as_str(), "alert.revision": signed(alert.revision) };
        let acknowledged = Alert {
            state: AlertState::Acknowledged,
            acknowledged_ms: Some(unix_millis()),
            acknowledged_by: Some(context.user().to_owned()),
            revision: alert.revision.saturating_add(1),
            ..alert
        };
        let stored = serialize_to_bson(&acknowledged)?;
        let update = doc! { "$set": { "alert": stored } };
        let updated = self.store.alerts.update_one(unchanged, update).await?;
        Ok((updated.matched_count == 1).then_some(acknowledged))
    }
}

/// Only an alert that is firing can be acknowledged.
fn check_state(alert: &Alert) -> Result<(), AlertError> {
    match alert.state {
        AlertState::Firing | AlertState::Acknowledged => Ok(()),
        AlertState::Pending => Err(conflict("the alert does not fire yet")),
        AlertState::Resolved => Err(conflict("the alert is resolved")),
    }
}

/// Describes an alert for the audit.
fn described(alert: &Alert) -> String {
    let vm = alert.instance_id.as_ref().map(|id| format!(" of VM {id}"));
    let subject = (!alert.subject.is_empty()).then(|| format!(", {}", alert.subject));
    format!(
        "{}{}{}",
        alert.rule_name,
        vm.unwrap_or_default(),
        subject.unwrap_or_default()
    )
}

/// The database's filter for a list of alerts.
fn selection(filter: &AlertFilter, scope: &Scope) -> Document {
    let mut all = vec![in_scope(scope)];
    all.push(match filter.state {
        None => doc! { "open": true },
        Some(state) => doc! { "alert.state": state.as_str() },
    });
    if let Some(severity) = filter.severity {
        all.push(doc! { "alert.severity": severity.as_str() });
    }
    if let Some(id) = &filter.instance_id {
        all.push(doc! { "alert.instance_id": id.as_str() });
    }
    if let Some(id) = &filter.rule_id {
        all.push(doc! { "alert.rule_id": id.as_str() });
    }
    if let Some(from_ms) = filter.from_ms {
        let ended = doc! { "alert.resolved_ms": { "$gte": signed(from_ms) } };
        all.push(doc! { "$or": [{ "open": true }, ended] });
    }
    if let Some(to_ms) = filter.to_ms {
        all.push(doc! { "alert.since_ms": { "$lt": signed(to_ms) } });
    }
    if let Some(after) = &filter.after {
        let since_ms = signed(after.since_ms);
        let same = doc! { "alert.since_ms": since_ms, "_id": { "$gt": after.id.as_str() } };
        all.push(doc! { "$or": [{ "alert.since_ms": { "$lt": since_ms } }, same] });
    }
    all.retain(|condition| !condition.is_empty());
    doc! { "$and": all }
}
