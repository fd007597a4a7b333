//! Lists, reads and changes rules.

use std::{collections::BTreeSet, sync::Arc};

use futures::TryStreamExt;
use mongodb::bson::{Document, deserialize_from_document, doc};
use vmwatch_api::{
    Scope,
    alerts::{
        RecordId, RecordRef, RevisionRef,
        rules::{MAX_RULES, Rule, RuleChange, RuleList, RuleSpec, RulesCreate, RulesRemove, RulesUpdate},
    },
    sessions::Own,
    time::unix_millis,
    users::Done,
};
use vmwatch_bus::Context;

use super::{
    Handlers, changed_meanwhile, check_size, conflict, described_change, invalid, new_id, not_found, scope_of,
};
use crate::{
    AlertError, definitions, starter,
    store::{StoredRule, is_duplicate, signed, unsigned},
};

impl Handlers {
    /// Lists the rules with the number of their active alerts in scope.
    pub(super) async fn list_rules(
        self: Arc<Self>,
        context: Context,
        _: Own,
    ) -> Result<RuleList, AlertError> {
        let scope = scope_of(&context);
        let active = self.count_active("$alert.rule_id", scope).await?;
        let read = definitions::read(&self.store).await?;
        let mut rules: Vec<_> = read
            .rules
            .into_iter()
            .filter_map(|rule| visible(scope, rule))
            .collect();
        for rule in &mut rules {
            rule.active = active.get(rule.id.as_str()).copied().unwrap_or(0);
        }
        // It is unknown which VMs such a rule names.
        let is_visible = *scope == Scope::All;
        Ok(RuleList {
            rules,
            unreadable: read.unreadable.into_iter().filter(|_| is_visible).collect(),
        })
    }

    pub(super) async fn get_rule(
        self: Arc<Self>,
        context: Context,
        rule: RecordRef,
    ) -> Result<Rule, AlertError> {
        let scope = scope_of(&context);
        let stored = self.find_rule(&rule.id).await?;
        let found = deserialize_from_document::<StoredRule>(stored).ok();
        let found = found.and_then(StoredRule::into_rule);
        let mut found = found
            .and_then(|rule| visible(scope, rule))
            .ok_or_else(|| not_found("rule"))?;
        let active = self.count_active("$alert.rule_id", scope).await?;
        found.active = active.get(rule.id.as_str()).copied().unwrap_or(0);
        Ok(found)
    }

    pub(super) async fn create_rule(
        self: Arc<Self>,
        context: Context,
        spec: RuleSpec,
    ) -> Result<Rule, AlertError> {
        let id = new_id::<RulesCreate>(&context)?;
        self.require_all_vms::<RulesCreate>(&context, Some(&id)).await?;
        self.check_recipients(&spec).await?;
        let read = definitions::read(&self.store).await?;
        let others = || {
            read.rules
                .iter()
                .filter(|rule| rule.id != id)
                .map(|rule| &rule.spec)
        };
        if others().count() + read.unreadable.len() >= MAX_RULES {
            return Err(conflict(format!(
                "there are already {MAX_RULES} rules; remove one first"
            )));
        }
        check_size("rules", others().chain([&spec]))?;
        let detail = spec.name.to_string();
        let rule = stored(&context, &id, 1, spec);
        let change = async {
            match self.store.rules.insert_one(&rule).await {
                Ok(_) => Ok(rule),
                Err(error) if is_duplicate(&error) => self.decoded_rule(&id).await,
                Err(error) => Err(error.into()),
            }
        };
        let created = self
            .audited::<RulesCreate, _>(&context, &id, detail, change)
            .await?;
        created.into_rule().ok_or_else(|| not_found("rule"))
    }

    /// Replaces a rule. A rule that cannot be decoded can be replaced as well.
    pub(super) async fn update_rule(
        self: Arc<Self>,
        context: Context,
        change: RuleChange,
    ) -> Result<Rule, AlertError> {
        let RuleChange { id, revision, spec } = change;
        self.require_all_vms::<RulesUpdate>(&context, Some(&id)).await?;
        self.check_recipients(&spec).await?;
        let before = self.find_rule(&id).await?;
        if unsigned(before.get_i64("revision").unwrap_or(0)) != revision {
            return Err(changed_meanwhile("rule"));
        }
        let before = deserialize_from_document::<StoredRule>(before).ok();
        if let Some(before) = before.as_ref().filter(|before| before.spec == spec) {
            return before.clone().into_rule().ok_or_else(|| not_found("rule"));
        }
        let read = definitions::read(&self.store).await?;
        let others = read.rules.iter().filter(|rule| rule.id != id);
        check_size("rules", others.map(|rule| &rule.spec).chain([&spec]))?;
        let detail = difference(before.as_ref().map(|before| &before.spec), &spec);
        let rule = stored(&context, &id, revision.saturating_add(1), spec);
        let change = async {
            let unchanged = unchanged(&id, revision);
            let replaced = self.store.rules.replace_one(unchanged, &rule).await?;
            if replaced.matched_count == 1 {
                Ok(rule)
            } else {
                Err(changed_meanwhile("rule"))
            }
        };
        let changed = self
            .audited::<RulesUpdate, _>(&context, &id, detail, change)
            .await?;
        changed.into_rule().ok_or_else(|| not_found("rule"))
    }

    /// Removes a rule. Of a starter rule a record remains, so that it is not created again.
    pub(super) async fn remove_rule(
        self: Arc<Self>,
        context: Context,
        rule: RevisionRef,
    ) -> Result<Done, AlertError> {
        let RevisionRef { id, revision } = rule;
        self.require_all_vms::<RulesRemove>(&context, Some(&id)).await?;
        let before = self.find_rule(&id).await?;
        if unsigned(before.get_i64("revision").unwrap_or(0)) != revision {
            return Err(changed_meanwhile("rule"));
        }
        let name = before.get_document("spec").and_then(|spec| spec.get_str("name"));
        let detail = name.unwrap_or_default().to_owned();
        let change = async {
            let unchanged = unchanged(&id, revision);
            let removed = if starter::contains(&id) {
                let mark = doc! { "$set": { "removed": true }, "$inc": { "revision": 1_i64 } };
                self.store.rules.update_one(unchanged, mark).await?.matched_count
            } else {
                self.store.rules.delete_one(unchanged).await?.deleted_count
            };
            if removed == 1 {
                Ok(Done {})
            } else {
                Err(changed_meanwhile("rule"))
            }
        };
        self.audited::<RulesRemove, _>(&context, &id, detail, change)
            .await
    }

    /// Finds a rule, which may be one that cannot be decoded.
    async fn find_rule(&self, id: &RecordId) -> Result<Document, AlertError> {
        let rules = self.store.rules.clone_with_type::<Document>();
        let found = rules
            .find_one(doc! { "_id": id.as_str(), "removed": { "$ne": true } })
            .await?;
        found.ok_or_else(|| not_found("rule"))
    }

    async fn decoded_rule(&self, id: &RecordId) -> Result<StoredRule, AlertError> {
        let found = deserialize_from_document(self.find_rule(id).await?);
        found.map_err(|_| not_found("rule"))
    }

    /// Refuses recipients that do not exist or are listed twice.
    async fn check_recipients(&self, spec: &RuleSpec) -> Result<(), AlertError> {
        let wanted: BTreeSet<_> = spec.recipients.iter().map(RecordId::as_str).collect();
        if wanted.len() != spec.recipients.len() {
            return Err(invalid("recipients: must list each channel once"));
        }
        if wanted.is_empty() {
            return Ok(());
        }
        let channels = self.store.channels.clone_with_type::<Document>();
        let ids: Vec<_> = wanted.iter().copied().collect();
        let found = channels
            .find(doc! { "_id": { "$in": ids } })
            .projection(doc! { "_id": 1 });
        let found: Vec<Document> = found.await?.try_collect().await?;
        let known: BTreeSet<_> = found
            .iter()
            .filter_map(|channel| channel.get_str("_id").ok())
            .collect();
        match wanted.difference(&known).next() {
            None => Ok(()),
            Some(unknown) => Err(invalid(format!("recipients: there is no channel {unknown}"))),
        }
    }
}

fn stored(context: &Context, id: &RecordId, revision: u64, spec: RuleSpec) -> StoredRule {
    StoredRule {
        id: id.to_string(),
        revision: signed(revision),
        spec,
        changed_by: context.user().to_owned(),
        changed_ms: signed(unix_millis()),
        removed: false,
        problem: None,
    }
}

/// The database's filter for a rule that has not changed since this revision.
fn unchanged(id: &RecordId, revision: u64) -> Document {
    doc! { "_id": id.as_str(), "revision": signed(revision), "removed": { "$ne": true } }
}

/// The rule as a principal with this scope may see it: without ids of VMs outside the scope. `None` if all VMs that the
/// rule lists are outside.
fn visible(scope: &Scope, mut rule: Rule) -> Option<Rule> {
    let ids = &mut rule.spec.vms.ids;
    let listed_none = ids.is_empty();
    ids.retain(|id| scope.allows(id));
    (listed_none || !ids.is_empty()).then_some(rule)
}

/// Describes for the audit which parts of a rule change.
fn difference(old: Option<&RuleSpec>, new: &RuleSpec) -> String {
    let Some(old) = old else {
        return format!("{}: replaced a rule that could not be read", new.name);
    };
    let parts = [
        (old.condition != new.condition, "condition"),
        (old.for_seconds != new.for_seconds, "duration"),
        (old.severity != new.severity, "severity"),
        (old.vms != new.vms, "VMs"),
        (old.recipients != new.recipients, "recipients"),
    ];
    described_change((&old.name, old.enabled), (&new.name, new.enabled), &parts)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(change: &Value) -> RuleSpec {
        let mut spec = json!({
            "name": "silent", "enabled": true, "condition": { "kind": "agent_silent" }, "for_seconds": 300,
            "severity": "critical",
        });
        let object = spec.as_object_mut().unwrap();
        object.extend(change.as_object().unwrap().clone());
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn audit_describes_which_parts_of_a_rule_change() {
        let old = spec(&json!({}));
        let new = spec(&json!({ "name": "quiet", "enabled": false, "severity": "info" }));
        assert_eq!(
            difference(Some(&old), &new),
            "quiet: name (was silent), disabled, severity"
        );
        let new = spec(&json!({ "vms": { "ids": ["vm-1"] }, "for_seconds": 0 }));
        assert_eq!(difference(Some(&old), &new), "silent: duration, VMs");
    }

    #[test]
    fn rule_shows_no_ids_outside_the_scope() {
        let rule = |ids: Value| Rule {
            id: RecordId::from_random([0; 16]),
            revision: 1,
            spec: spec(&json!({ "vms": { "ids": ids } })),
            changed_by: String::new(),
            changed_ms: 0,
            problem: None,
            active: 0,
        };
        let scope = Scope::Only(vec!["vm-1".parse().unwrap()]);
        let seen = |ids| visible(&scope, rule(ids)).map(|rule| rule.spec.vms.ids.len());
        assert_eq!(seen(json!(["vm-1", "vm-2"])), Some(1));
        assert_eq!(seen(json!(["vm-2"])), None);
        assert_eq!(seen(json!([])), Some(0));
    }
}
