//! Handlers of the bus methods of alert-svc.
//!
//! Rules, silences and channels concern all VMs, so a change of them needs the scope of all VMs. It is recorded in the
//! audit before it is made, and is based on a revision that the user has seen.

mod alerts;
mod channels;
mod messages;
mod preview;
mod rules;
mod silences;

use std::sync::Arc;

use mongodb::bson::{Document, doc};
use serde::Serialize;
use tokio::sync::Notify;
use vmwatch_api::{
    Kind, Method, MethodInfo, Scope, Service,
    alerts::{
        AlertsAcknowledge, AlertsGet, AlertsList, RecordId, RecordRef, Title,
        channels::{
            ChannelsCreate, ChannelsList, ChannelsNames, ChannelsRemove, ChannelsTest, ChannelsUpdate,
            MessagesList,
        },
        rules::{RulesCreate, RulesGet, RulesList, RulesPreview, RulesRemove, RulesUpdate},
        silences::{SilencesCreate, SilencesEnd, SilencesList},
    },
    audit::{AuditRecord, AuditResult},
    first_page,
    time::unix_millis,
    wire::{Fault, FaultKind},
};
use vmwatch_bus::{
    Bus, Context,
    audit::{Audit, Refusals},
    serve::{Refused, ServeSettings, Server, bind},
};

use crate::{
    AlertError, definitions::DefinitionsHandle, events::Events, notify::addresses::Addresses, seal::Keys,
    store::Store,
};

/// State that the handlers share.
pub(crate) struct Handlers {
    pub(crate) bus: Bus,
    pub(crate) store: Store,
    pub(crate) definitions: DefinitionsHandle,
    pub(crate) events: Events,
    pub(crate) keys: Arc<Keys>,
    /// The rules for addresses of receivers.
    pub(crate) addresses: Arc<Addresses>,
    /// Notified when the notifier has something to do.
    pub(crate) changed: Arc<Notify>,
    pub(crate) audit: Audit,
    pub(crate) refusals: Refusals,
}

impl Handlers {
    /// Creates the bus server that answers all methods of alert-svc.
    pub(crate) fn server(self: &Arc<Self>, settings: ServeSettings) -> Server {
        let for_refusals = Arc::clone(self);
        let server = Server::new(&self.bus, Service::Alert, settings).on_refusal(move |refused| {
            let handlers = Arc::clone(&for_refusals);
            async move { handlers.refused(refused).await }
        });
        let server = server
            .method(AlertsList, bind(self, Self::list_alerts))
            .method(AlertsGet, bind(self, Self::get_alert))
            .method(AlertsAcknowledge, bind(self, Self::acknowledge_alert))
            .method(RulesList, bind(self, Self::list_rules))
            .method(RulesGet, bind(self, Self::get_rule))
            .method(RulesCreate, bind(self, Self::create_rule))
            .method(RulesUpdate, bind(self, Self::update_rule))
            .method(RulesRemove, bind(self, Self::remove_rule))
            .method(RulesPreview, bind(self, Self::preview_rule));
        server
            .method(SilencesList, bind(self, Self::list_silences))
            .method(SilencesCreate, bind(self, Self::create_silence))
            .method(SilencesEnd, bind(self, Self::end_silence))
            .method(ChannelsList, bind(self, Self::list_channels))
            .method(ChannelsNames, bind(self, Self::list_channel_names))
            .method(ChannelsCreate, bind(self, Self::create_channel))
            .method(ChannelsUpdate, bind(self, Self::update_channel))
            .method(ChannelsRemove, bind(self, Self::remove_channel))
            .method(ChannelsTest, bind(self, Self::test_channel))
            .method(MessagesList, bind(self, Self::list_messages))
    }

    /// Writes an audit record of a command that was refused because of the user's role.
    async fn refused(&self, refused: Refused) {
        if refused.method.kind == Kind::Command {
            let target = serde_json::from_slice::<RecordRef>(&refused.body).ok();
            let target = target.as_ref().map(|target| &target.id);
            self.record_refusal(&refused.context, refused.method, target, &refused.fault)
                .await;
        }
    }

    async fn record_refusal(
        &self,
        context: &Context,
        method: MethodInfo,
        target: Option<&RecordId>,
        fault: &Fault,
    ) {
        let record = AuditRecord {
            at_ms: unix_millis(),
            action: method.subject.to_owned(),
            user: context.user().to_owned(),
            api_token: context.api_token.clone(),
            source: context.source.clone(),
            target: target.map(RecordId::to_string),
            request_id: context.request_id.clone(),
            operation_id: None,
            result: AuditResult::Refused,
            detail: fault.message.clone(),
        };
        let once = format!("{}.refused", context.request_id);
        self.refusals.record(&record, &once).await;
    }

    /// Refuses the request unless the principal has the scope of all VMs, and records the refusal of a command in the
    /// audit.
    async fn require_all_vms<M: Method>(
        &self,
        context: &Context,
        target: Option<&RecordId>,
    ) -> Result<(), AlertError> {
        if *scope_of(context) == Scope::All {
            return Ok(());
        }
        let fault = Fault::new(
            FaultKind::Forbidden,
            "this request concerns all VMs, but the user may see only some of them",
        );
        if M::INFO.kind == Kind::Command {
            self.record_refusal(context, M::INFO, target, &fault).await;
        }
        Err(fault.into())
    }

    /// Makes a change with an audit record before it and another one with its result after it.
    async fn audited<M: Method, T>(
        &self,
        context: &Context,
        target: &RecordId,
        detail: String,
        change: impl Future<Output = Result<T, AlertError>>,
    ) -> Result<T, AlertError> {
        let in_time = async {
            if context.remaining().is_zero() {
                let text = "the deadline passed before the change was made";
                return Err(Fault::new(FaultKind::Timeout, text).into());
            }
            change.await
        };
        // The future is large, because it contains the change.
        let announced = Box::pin(self.audit.announced(context, &M::INFO, target, detail, in_time));
        let changed = announced.await?;
        self.definitions.reload();
        Ok(changed)
    }
}

/// The scope of the principal. All methods need a role, so there is a principal; without one, no VM is in scope.
fn scope_of(context: &Context) -> &Scope {
    const NOTHING: &Scope = &Scope::Only(Vec::new());
    let principal = context.principal.as_ref();
    principal.map_or(NOTHING, |principal| &principal.scope)
}

/// The conditions under which a stored alert is in scope. Only the scope of all VMs contains alerts without a VM.
fn in_scope(scope: &Scope) -> Document {
    match scope {
        Scope::All => doc! {},
        Scope::Only(ids) => {
            let ids: Vec<_> = ids.iter().map(vmwatch_api::InstanceId::as_str).collect();
            doc! { "alert.instance_id": { "$in": ids } }
        }
        Scope::Unknown => doc! { "alert.instance_id": { "$in": [] } },
    }
}

/// The id of a record that a request creates. A request that is delivered twice gets the same id.
fn new_id<M: Method>(context: &Context) -> Result<RecordId, AlertError> {
    if let Some(key) = &context.idempotency_key {
        return Ok(RecordId::from_parts(&[M::INFO.subject, context.user(), key]));
    }
    let mut bits = [0; 16];
    getrandom::fill(&mut bits)?;
    Ok(RecordId::from_random(bits))
}

fn invalid(text: impl Into<String>) -> AlertError {
    Fault::new(FaultKind::Invalid, text).into()
}

fn conflict(text: impl Into<String>) -> AlertError {
    Fault::new(FaultKind::Conflict, text).into()
}

fn not_found(what: &str) -> AlertError {
    Fault::new(FaultKind::NotFound, format!("there is no {what} with this id")).into()
}

/// The fault for a change that is based on an old revision.
fn changed_meanwhile(what: &str) -> AlertError {
    conflict(format!(
        "the {what} was changed meanwhile; read it again and repeat the change"
    ))
}

/// Refuses a record if the list that contains it would not fit into one message on the bus.
fn check_size<T: Serialize>(what: &str, list: impl IntoIterator<Item = T>) -> Result<(), AlertError> {
    let (_, more) = first_page(list, usize::MAX);
    if more {
        return Err(conflict(format!(
            "all {what} together would be larger than 768 KiB; shorten or remove some"
        )));
    }
    Ok(())
}

/// Describes for the audit which parts of a rule or channel change: its old name, whether it is enabled now if that changes, and
/// the names of the other parts that differ.
fn described_change(old: (&Title, bool), new: (&Title, bool), parts: &[(bool, &str)]) -> String {
    let mut changed = Vec::new();
    if old.0 != new.0 {
        changed.push(format!("name (was {})", old.0));
    }
    if old.1 != new.1 {
        changed.push(if new.1 { "enabled" } else { "disabled" }.to_owned());
    }
    let parts = parts.iter().filter(|(differs, _)| *differs);
    changed.extend(parts.map(|(_, part)| (*part).to_owned()));
    shortened(format!("{}: {}", new.0, changed.join(", ")))
}

/// Shortens a text for the audit.
fn shortened(mut text: String) -> String {
    /// Length at which the description of a change in the audit is cut off, in bytes.
    const MAX_DETAIL: usize = 2000;
    if text.len() > MAX_DETAIL {
        text.truncate(text.floor_char_boundary(MAX_DETAIL));
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn repeated_request_creates_the_same_record() {
        let context = Context::new(Duration::from_secs(5)).with_fresh_key();
        let id = new_id::<RulesCreate>(&context).unwrap();
        assert_eq!(new_id::<RulesCreate>(&context).unwrap(), id);
        assert_ne!(new_id::<SilencesCreate>(&context).unwrap(), id);
        let without_key = Context::new(Duration::from_secs(5));
        assert_ne!(
            new_id::<RulesCreate>(&without_key).unwrap(),
            new_id::<RulesCreate>(&without_key).unwrap()
        );
    }

    #[test]
    fn limited_scope_contains_no_alert_without_vm() {
        assert_eq!(in_scope(&Scope::All), doc! {});
        let only = Scope::Only(vec!["vm-1".parse().unwrap()]);
        assert_eq!(in_scope(&only), doc! { "alert.instance_id": { "$in": ["vm-1"] } });
        let nothing: [String; 0] = [];
        assert_eq!(
            in_scope(&Scope::Unknown),
            doc! { "alert.instance_id": { "$in": nothing.to_vec() } }
        );
    }

    #[test]
    fn list_that_is_too_large_for_the_bus_is_refused() {
        let texts = |count| std::iter::repeat_n("x".repeat(1000), count);
        assert!(check_size("rules", texts(700)).is_ok());
        let refused = Fault::from(check_size("rules", texts(800)).unwrap_err());
        assert_eq!(refused.kind, FaultKind::Conflict);
    }
}
