//! Lists, creates and ends silences.

use std::sync::Arc;

use futures::TryStreamExt;
use mongodb::bson::{Document, deserialize_from_document, doc};
use vmwatch_api::{
    Scope,
    alerts::{
        RecordRef,
        silences::{
            MAX_SILENCE_MS, MAX_SILENCES, NewSilence, Silence, SilenceList, SilencesCreate, SilencesEnd,
        },
    },
    first_page,
    history::TimeRange,
    sessions::Own,
    time::unix_millis,
};
use vmwatch_bus::Context;

use super::{
    Handlers, changed_meanwhile, check_size, conflict, invalid, new_id, not_found, scope_of, shortened,
};
use crate::{
    AlertError,
    retention::SILENCES_KEPT,
    store::{StoredSilence, is_duplicate, signed},
};

impl Handlers {
    /// Lists the silences that have not ended, and as many of the others as fit into the answer.
    pub(super) async fn list_silences(
        self: Arc<Self>,
        context: Context,
        _: Own,
    ) -> Result<SilenceList, AlertError> {
        let now_ms = unix_millis();
        let kept_ms = u64::try_from(SILENCES_KEPT.as_millis()).unwrap_or(u64::MAX);
        let scope = scope_of(&context);
        let found = self.read_silences(now_ms.saturating_sub(kept_ms)).await?;
        let mut found: Vec<_> = found
            .into_iter()
            .filter(|silence| is_visible(scope, silence))
            .collect();
        found.sort_by_key(|silence| silence.silence.range.to_ms() <= now_ms);
        let (mut silences, _) = first_page(found, MAX_SILENCES);
        silences.sort_by_key(|silence| std::cmp::Reverse(silence.created_ms));
        Ok(SilenceList { silences })
    }

    /// Reads the silences that end after a time, the newest first. Those that cannot be decoded are skipped;
    /// `definitions` logs them.
    async fn read_silences(&self, after_ms: u64) -> Result<Vec<Silence>, AlertError> {
        let silences = self.store.silences.clone_with_type::<Document>();
        let found = silences
            .find(doc! { "until_ms": { "$gt": signed(after_ms) } })
            .sort(doc! { "until_ms": -1 })
            .limit(i64::try_from(MAX_SILENCES * 2).unwrap_or(i64::MAX));
        let found: Vec<Document> = found.await?.try_collect().await?;
        let found = found
            .into_iter()
            .filter_map(|document| deserialize_from_document::<StoredSilence>(document).ok());
        Ok(found.filter_map(StoredSilence::into_silence).collect())
    }

    pub(super) async fn create_silence(
        self: Arc<Self>,
        context: Context,
        silence: NewSilence,
    ) -> Result<Silence, AlertError> {
        let id = new_id::<SilencesCreate>(&context)?;
        self.require_all_vms::<SilencesCreate>(&context, Some(&id))
            .await?;
        let now_ms = unix_millis();
        check_range(silence.range, now_ms)?;
        let mut open = self.read_silences(now_ms).await?;
        open.retain(|other| other.id != id);
        if open.len() >= MAX_SILENCES {
            return Err(conflict(format!(
                "there are already {MAX_SILENCES} silences; end one first"
            )));
        }
        let others = open.iter().map(|other| &other.silence);
        check_size("silences", others.chain([&silence]))?;
        let detail = described(&silence);
        let stored = StoredSilence {
            id: id.to_string(),
            until_ms: signed(silence.range.to_ms()),
            silence,
            created_by: context.user().to_owned(),
            created_ms: signed(now_ms),
        };
        let change = async {
            match self.store.silences.insert_one(&stored).await {
                Ok(_) => Ok(stored),
                Err(error) if is_duplicate(&error) => self.find_silence(&RecordRef { id: id.clone() }).await,
                Err(error) => Err(error.into()),
            }
        };
        let created = self
            .audited::<SilencesCreate, _>(&context, &id, detail, change)
            .await?;
        created.into_silence().ok_or_else(|| not_found("silence"))
    }

    async fn find_silence(&self, silence: &RecordRef) -> Result<StoredSilence, AlertError> {
        let found = self
            .store
            .silences
            .find_one(doc! { "_id": silence.id.as_str() })
            .await?;
        found.ok_or_else(|| not_found("silence"))
    }

    /// Ends a silence now. One that has ended stays as it is.
    pub(super) async fn end_silence(
        self: Arc<Self>,
        context: Context,
        silence: RecordRef,
    ) -> Result<Silence, AlertError> {
        self.require_all_vms::<SilencesEnd>(&context, Some(&silence.id))
            .await?;
        let mut found = self.find_silence(&silence).await?;
        let now_ms = unix_millis();
        if found.until_ms <= signed(now_ms) {
            return found.into_silence().ok_or_else(|| not_found("silence"));
        }
        let unchanged = doc! { "_id": silence.id.as_str(), "until_ms": found.until_ms };
        // A silence that has not begun yet gets the shortest range.
        let from_ms = found.silence.range.from_ms().min(now_ms.saturating_sub(1));
        let ended = TimeRange::new(from_ms, now_ms).ok_or_else(|| invalid(TimeRange::RULE))?;
        found.silence.range = ended;
        found.until_ms = signed(now_ms);
        let detail = described(&found.silence);
        let change = async {
            let replaced = self.store.silences.replace_one(unchanged, &found).await?;
            if replaced.matched_count == 1 {
                Ok(found)
            } else {
                Err(changed_meanwhile("silence"))
            }
        };
        let ended = self
            .audited::<SilencesEnd, _>(&context, &silence.id, detail, change)
            .await?;
        ended.into_silence().ok_or_else(|| not_found("silence"))
    }
}

fn check_range(range: TimeRange, now_ms: u64) -> Result<(), AlertError> {
    if range.length_ms() > MAX_SILENCE_MS {
        return Err(invalid("range: a silence must be at most 366 days long"));
    }
    if range.to_ms() <= now_ms {
        return Err(invalid("range: a silence must end in the future"));
    }
    Ok(())
}

/// Whether a principal with this scope may see the silence. One that names a VM outside the scope is hidden; a name at
/// the hypervisor may belong to any VM.
fn is_visible(scope: &Scope, silence: &Silence) -> bool {
    let labels = silence.silence.matchers.labels();
    if *scope == Scope::All {
        return true;
    }
    match labels.get("instance_id").map(|id| id.parse()) {
        Some(Ok(id)) => scope.allows(&id),
        Some(Err(_)) => false,
        None => !labels.contains_key("vm_name"),
    }
}

/// Describes a silence for the audit, such as `env=prod, rule=CPU above 95 %`.
fn described(silence: &NewSilence) -> String {
    let labels = silence.matchers.labels().iter();
    let labels: Vec<_> = labels.map(|(key, value)| format!("{key}={value}")).collect();
    shortened(labels.join(", "))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use vmwatch_api::{alerts::RecordId, wire::FaultKind};

    use super::*;

    fn silence(matchers: &Value) -> Silence {
        let new = json!({ "matchers": matchers, "range": { "from_ms": 1, "to_ms": 2 } });
        Silence {
            id: RecordId::from_random([0; 16]),
            silence: serde_json::from_value(new).unwrap(),
            created_by: "ann".to_owned(),
            created_ms: 1,
        }
    }

    #[test]
    fn silence_that_names_a_vm_outside_the_scope_is_hidden() {
        let scope = Scope::Only(vec!["vm-1".parse().unwrap()]);
        for (matchers, seen) in [
            (json!({ "env": "prod" }), true),
            (json!({ "instance_id": "vm-1", "vm_name": "db" }), true),
            (json!({ "instance_id": "vm-2" }), false),
            (json!({ "instance_id": "not an id" }), false),
            (json!({ "vm_name": "db" }), false),
        ] {
            assert_eq!(is_visible(&scope, &silence(&matchers)), seen, "{matchers}");
            assert!(is_visible(&Scope::All, &silence(&matchers)));
        }
    }

    #[test]
    fn silence_must_end_in_the_future_and_within_a_year() {
        let kind = |from, to, now| {
            let checked = check_range(TimeRange::new(from, to).unwrap(), now);
            checked
                .err()
                .map(|error| vmwatch_api::wire::Fault::from(error).kind)
        };
        assert_eq!(kind(1, MAX_SILENCE_MS + 1, 5), None);
        assert_eq!(kind(0, MAX_SILENCE_MS + 1, 5), Some(FaultKind::Invalid));
        assert_eq!(kind(1, 5, 5), Some(FaultKind::Invalid));
    }

    /// A key such as `$where` or one with a zero byte has no meaning in the database.
    #[test]
    fn stored_silence_keeps_any_label() {
        let matchers = json!({ "$where": "1", "a.b": "$gt", "zero\u{0}": "" });
        let new = silence(&matchers);
        let stored = StoredSilence {
            id: new.id.to_string(),
            silence: new.silence.clone(),
            created_by: new.created_by.clone(),
            created_ms: 1,
            until_ms: 2,
        };
        let document = mongodb::bson::serialize_to_document(&stored).unwrap();
        assert!(document.get_str("silence").is_ok());
        let read: StoredSilence = deserialize_from_document(document).unwrap();
        assert_eq!(read.into_silence(), Some(new));
    }
}
