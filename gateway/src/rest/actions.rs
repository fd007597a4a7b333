//! Giving commands to VMs.
//!
//! A command on the bus is answered when it has ended; here it is answered as soon as it is on record, with the record's
//! address. Its idempotency key tells the record's id beforehand.

use std::{sync::Arc, time::Duration};

use axum::{
    extract::{FromRequestParts, State},
    http::{HeaderValue, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
};
use futures::{StreamExt, stream};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout};
use utoipa::ToSchema;
use vmwatch_api::{
    InstanceId, Kind, Method, MethodInfo,
    lifecycle::{
        self, ForceStop, OperationId, OperationRef, OperationState, OperationsGet, Reboot, RebootTarget,
        Start, Stop, Target,
    },
    wire::{Fault, FaultKind},
};
use vmwatch_bus::{Context, limits::Permit, random_id};

use super::{
    PATH,
    caller::Caller,
    extract::{Json, NoParameters, Number, Path, Query},
    operations::{Action, Operation},
    problem::Problem,
};
use crate::Gateway;

/// Between two looks at the record of a command that has just been given.
const LOOK: Duration = Duration::from_millis(50);
/// A command that is on record is answered after so long, begun or not.
const PATIENCE: Duration = Duration::from_secs(1);
/// A request for several VMs ends after so long; what has not begun by then does not begin.
const WHOLE: Duration = Duration::from_mins(5);
/// The most VMs of one request, and how many act together unless it says so.
const MOST_VMS: usize = 100;
const TOGETHER: u64 = 4;
/// How many act together.
type Together = Number<1, 16>;

/// The caller's own key of a command, or a fresh one: the same key never acts twice on a VM.
#[derive(Debug)]
pub(super) struct IdempotencyKey(String);

impl FromRequestParts<Arc<Gateway>> for IdempotencyKey {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &Arc<Gateway>) -> Result<Self, Problem> {
        let Some(value) = parts.headers.get("idempotency-key") else {
            return Ok(Self(random_id()));
        };
        let fits =
            |key: &&str| (1..=128).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic());
        let key = value.to_str().ok().filter(fits);
        key.map(|key| Self(key.to_owned()))
            .ok_or_else(|| Problem::invalid("Idempotency-Key must be 1 to 128 visible ASCII characters"))
    }
}

/// A command for one VM.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Command {
    /// What to do.
    action: Action,
}

/// Give a command
///
/// It is answered as soon as the command is on record, with the record's address: what became of it is there, and among
/// the live events. The same `Idempotency-Key` never acts twice: it answers the record of the first time.
#[utoipa::path(
    post, path = "/vms/{instance_id}/actions", tag = "operations", operation_id = "act", request_body = Command,
    params(
        ("instance_id" = InstanceId, Path, description = "the VM's id"),
        ("Idempotency-Key" = Option<String>, Header, description = "1 to 128 visible ASCII characters; a fresh one is made unless given",
         pattern = "^[!-~]{1,128}$"),
    ),
    responses(
        (status = ACCEPTED, body = Operation, description = "the command is on record",
         headers(("Location" = String, description = "the record's address"))),
        (status = CONFLICT, response = super::openapi::Conflict),
    ),
)]
pub(super) async fn act(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(instance_id): Path<InstanceId>,
    IdempotencyKey(key): IdempotencyKey,
    Query(NoParameters {}): Query<NoParameters>,
    Json(Command { action }): Json<Command>,
) -> Result<Response, Problem> {
    let given = Given::new(&gateway, &caller, instance_id, action, &key);
    let operation = Operation::from(given.begin().await?);
    let location = format!("{PATH}/operations/{}", operation.id);
    let mut response = (StatusCode::ACCEPTED, axum::Json(operation)).into_response();
    response
        .headers_mut()
        .extend(HeaderValue::from_str(&location).map(|location| (header::LOCATION, location)));
    Ok(response)
}

/// A command for several VMs.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct CommandForSeveral {
    /// What to do.
    action: Action,
    /// Which VMs, in which order.
    #[serde(deserialize_with = "some_vms")]
    #[schema(min_items = 1, max_items = 100)]
    instance_ids: Vec<InstanceId>,
    /// How many act together; 4 unless given.
    #[schema(inline)]
    at_once: Option<Together>,
}

fn some_vms<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<InstanceId>, D::Error> {
    let ids = Vec::<InstanceId>::deserialize(deserializer)?;
    if (1..=MOST_VMS).contains(&ids.len()) {
        Ok(ids)
    } else {
        Err(serde::de::Error::custom(format!("must be 1 to {MOST_VMS} ids")))
    }
}

/// What became of a command on one of several VMs.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Outcome {
    /// Which VM.
    instance_id: InstanceId,
    /// The command's record; null where it was not begun.
    #[schema(required)]
    operation: Option<Operation>,
    /// Why it was not begun.
    #[schema(required)]
    refusal: Option<Refusal>,
}

/// Why a command was not begun.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Refusal {
    /// The kind, for programs.
    code: FaultKind,
    /// In plain words.
    detail: String,
}

/// What became of a command on several VMs.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Outcomes {
    /// One for each VM, in the order of the request.
    outcomes: Vec<Outcome>,
}

/// Give a command to several VMs
///
/// A bounded number acts together, and the answer comes when the last one has ended, after five minutes at the most: what
/// has not begun by then does not begin, nor does what has not begun when the client hangs up. What has begun goes on
/// either way; its records and the live events tell how.
#[utoipa::path(
    post, path = "/actions", tag = "operations", operation_id = "act_on_several", request_body = CommandForSeveral,
    params(
        ("Idempotency-Key" = Option<String>, Header, description = "1 to 128 visible ASCII characters; a fresh one is made unless given",
         pattern = "^[!-~]{1,128}$"),
    ),
    responses((status = OK, body = Outcomes, description = "what became of it")),
)]
pub(super) async fn act_on_several(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    IdempotencyKey(key): IdempotencyKey,
    Query(NoParameters {}): Query<NoParameters>,
    Json(command): Json<CommandForSeveral>,
) -> Result<axum::Json<Outcomes>, Problem> {
    let _permit = gateway.admission.enter_batch(&caller.principal().user).await?;
    let together = command.at_once.map_or(TOGETHER, Together::get);
    let until = Instant::now() + WHOLE;
    let (gateway, caller, key) = (&gateway, &caller, key.as_str());
    let outcomes: Vec<Outcome> = stream::iter(command.instance_ids)
        .map(|instance_id| async move {
            let info = method(command.action);
            let turn = gateway
                .admission
                .enter_until(&info, &caller.principal().user, until);
            let outcome = match turn.await {
                Ok(permit) => {
                    let given = Given::new(gateway, caller, instance_id.clone(), command.action, key);
                    given.until_ended(permit).await
                }
                Err(_) => Err(Fault::new(FaultKind::Timeout, "its turn did not come in time")),
            };
            Outcome::new(instance_id, outcome)
        })
        .buffered(usize::try_from(together).unwrap_or(1))
        .collect()
        .await;
    // Whose role does not allow it may not for any VM.
    match outcomes.iter().find_map(Outcome::forbidden) {
        Some(detail) => Err(Fault::new(FaultKind::Forbidden, detail).into()),
        None => Ok(axum::Json(Outcomes { outcomes })),
    }
}

impl Outcome {
    fn forbidden(&self) -> Option<String> {
        let refusal = self.refusal.as_ref()?;
        (refusal.code == FaultKind::Forbidden).then(|| refusal.detail.clone())
    }

    fn new(instance_id: InstanceId, outcome: Result<lifecycle::Operation, Fault>) -> Self {
        let (operation, refusal) = match outcome {
            Ok(operation) => (Some(operation.into()), None),
            Err(fault) => {
                let refusal = Refusal {
                    code: fault.kind,
                    detail: fault.message,
                };
                (None, Some(refusal))
            }
        };
        Self {
            instance_id,
            operation,
            refusal,
        }
    }
}

/// A command as it was given.
struct Given<'a> {
    gateway: &'a Arc<Gateway>,
    caller: &'a Caller,
    context: Context,
    instance_id: InstanceId,
    action: Action,
    record: OperationRef,
}

impl<'a> Given<'a> {
    fn new(
        gateway: &'a Arc<Gateway>,
        caller: &'a Caller,
        instance_id: InstanceId,
        action: Action,
        key: &str,
    ) -> Self {
        let mut context = caller.context(gateway, Kind::Command);
        context.idempotency_key = Some(key.to_owned());
        let (verb, _) = action.verb();
        let operation_id = OperationId::of_key(&caller.principal().user, &instance_id, verb, key);
        Self {
            gateway,
            caller,
            context,
            instance_id,
            action,
            record: OperationRef { operation_id },
        }
    }

    /// Gives the command, and waits until it has begun.
    async fn begin(self) -> Result<lifecycle::Operation, Fault> {
        let info = method(self.action);
        let permit = self.gateway.admission.enter(&info, &self.context).await?;
        let (gateway, context) = (Arc::clone(self.gateway), self.context.clone());
        let (instance_id, action) = (self.instance_id.clone(), self.action);
        // Goes on when this request has been answered, or was given up.
        let mut call =
            tokio::spawn(async move { send(&gateway, &context, instance_id, action, permit).await });
        let given_at = Instant::now();
        let mut pause = LOOK;
        loop {
            if let Ok(ended) = timeout(pause, &mut call).await {
                let ended = ended.map_err(|error| {
                    Fault::new(FaultKind::Internal, "the command was lost").caused_by(error)
                })?;
                return self.ended(ended).await;
            }
            if let Ok(operation) = self.look().await
                && (operation.state != OperationState::Requested || given_at.elapsed() > PATIENCE)
            {
                return Ok(operation);
            }
            pause = (pause * 2).min(PATIENCE);
        }
    }

    /// Gives the command, and waits until it has ended.
    async fn until_ended(self, permit: Permit) -> Result<lifecycle::Operation, Fault> {
        let instance_id = self.instance_id.clone();
        let ended = send(self.gateway, &self.context, instance_id, self.action, permit).await;
        self.ended(ended).await
    }

    /// The record of a command that was answered; the fault where it has none, or is none of this command's.
    async fn ended(&self, ended: Result<(), Fault>) -> Result<lifecycle::Operation, Fault> {
        let record = self.look().await;
        match (ended, record) {
            (Ok(()), record) => record,
            // The record is that of a VM that is not.
            (Err(fault), _) if fault.kind == FaultKind::NotFound => Err(fault),
            // The record is another command's with this key.
            (Err(fault), Ok(record)) if record.hard != self.action.verb().1 => Err(fault),
            (Err(_), Ok(record)) => Ok(record),
            (Err(fault), Err(_)) => Err(fault),
        }
    }

    async fn look(&self) -> Result<lifecycle::Operation, Fault> {
        self.caller.ask::<OperationsGet>(self.gateway, &self.record).await
    }
}

/// The method of an action.
const fn method(action: Action) -> MethodInfo {
    match action {
        Action::Start => Start::INFO,
        Action::Stop => Stop::INFO,
        Action::ForceStop => ForceStop::INFO,
        Action::Reboot | Action::Reset => Reboot::INFO,
    }
}

/// Gives the command, and waits for its end; the permit is held until then.
async fn send(
    gateway: &Gateway,
    context: &Context,
    instance_id: InstanceId,
    action: Action,
    _permit: Permit,
) -> Result<(), Fault> {
    let bus = &gateway.bus;
    let target = Target { instance_id };
    match action {
        Action::Start => bus.call::<Start>(context, &target).await,
        Action::Stop => bus.call::<Stop>(context, &target).await,
        Action::ForceStop => bus.call::<ForceStop>(context, &target).await,
        Action::Reboot | Action::Reset => {
            let target = RebootTarget {
                instance_id: target.instance_id,
                hard: action.verb().1,
            };
            bus.call::<Reboot>(context, &target).await
        }
    }
    .map(drop)
}
