//! REST routes for the enrolment of agents: an agent registers its public key, an administrator lists and revokes keys.

use std::sync::Arc;

use axum::{extract::State, http::StatusCode};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use vmwatch_api::{
    InstanceId, Method,
    enrollment::{
        self, AgentKey, AgentPage, AgentRef, AgentSummary, AgentsEnroll, AgentsList, AgentsRevoke,
        JoinTokenId, Platform, SecretText,
    },
    time::UtcOffset,
    wire::FaultKind,
};

use super::{
    caller::{Caller, Visitor},
    extract::{Json, NoParameters, PageLimit, Path, Query, page_limit},
    problem::Problem,
    time::Timestamp,
};
use crate::Gateway;

/// An enrolled agent.
#[derive(Serialize, ToSchema)]
pub(super) struct EnrolledAgent {
    /// Id of the agent's VM.
    instance_id: InstanceId,
    /// Public key with which the agent logs in to NATS.
    public_key: AgentKey,
    /// Id of the join token that the agent used.
    join_token_id: JoinTokenId,
    /// Time at which the agent was enrolled.
    enrolled_at: Timestamp,
    /// Client address from which the agent was enrolled.
    #[schema(required)]
    source: Option<String>,
    /// Time at which the key was revoked; null if it is valid.
    #[schema(required)]
    revoked_at: Option<Timestamp>,
}

impl From<AgentSummary> for EnrolledAgent {
    fn from(agent: AgentSummary) -> Self {
        Self {
            instance_id: agent.instance_id,
            public_key: agent.public_key,
            join_token_id: agent.join_token,
            enrolled_at: Timestamp::of_ms(agent.enrolled_at_ms),
            source: agent.source,
            revoked_at: agent.revoked_at_ms.map(Timestamp::of_ms),
        }
    }
}

/// A page of enrolled agents.
#[derive(Serialize, ToSchema)]
pub(super) struct EnrolledAgents {
    /// Agents, sorted by the id of their VM.
    agents: Vec<EnrolledAgent>,
    /// Value of `after` for the next page; null on the last page.
    #[schema(required)]
    next: Option<InstanceId>,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct AgentsQuery {
    /// The `next` value of the previous page: return only agents of VMs whose ids come after it.
    after: Option<InstanceId>,
    /// Maximum number of agents in the answer. Default: 100.
    #[param(inline)]
    limit: Option<PageLimit>,
}

/// An agent to enrol.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewAgent {
    /// The join token.
    #[schema(value_type = String, format = Password, max_length = 1024)]
    token: SecretText,
    /// Id of the agent's VM.
    instance_id: InstanceId,
    /// Public key of the agent, whose private key stays in the VM.
    public_key: AgentKey,
    /// What the platform says of the VM, with the source as its prefix, such as `dmi:` and the product UUID. A clone of
    /// the VM has another one.
    #[serde(default)]
    #[schema(value_type = Option<String>, pattern = "^[!-~]{1,128}$")]
    platform: Option<Platform>,
}

/// What an enrolled agent needs in order to report.
#[derive(Serialize, ToSchema)]
pub(super) struct Enrolled {
    /// Id of the agent's VM.
    instance_id: InstanceId,
    /// URLs of the NATS servers.
    #[schema(example = json!(["tls://bus.example.com:4222"]))]
    nats_urls: Vec<String>,
    /// PEM certificates of the authorities that sign the certificates of the NATS servers; empty if the authorities that
    /// the VM trusts do.
    ca_certificates: String,
    /// UTC offset of the deployment.
    #[schema(value_type = String, example = "+08:00")]
    utc_offset: UtcOffset,
    /// Interval at which the agent samples the VM, in milliseconds.
    vm_interval_ms: u64,
    /// Interval at which the agent samples processes, in milliseconds.
    process_interval_ms: u64,
}

impl From<enrollment::Enrolled> for Enrolled {
    fn from(enrolled: enrollment::Enrolled) -> Self {
        Self {
            instance_id: enrolled.instance_id,
            nats_urls: enrolled.nats_urls,
            ca_certificates: enrolled.ca_certificates,
            utc_offset: enrolled.utc_offset,
            vm_interval_ms: enrolled.vm_interval_ms,
            process_interval_ms: enrolled.process_interval_ms,
        }
    }
}

/// Enrol an agent
///
/// Registers the public key of an agent, for which a join token is needed instead of a session. The answer to a
/// malformed, unknown or wrong token is always the same (401). Only a caller with the right secret learns that the token
/// is expired, used up, revoked or not for this VM, that its creator may not enrol this VM, or that the key was revoked or
/// replaced (403), or that the VM has an agent (409). The same request can be repeated.
#[utoipa::path(
    post, path = "/agents", tag = "agents", operation_id = "enroll_agent", security(()), request_body = NewAgent,
    responses(
        (status = CREATED, body = Enrolled, description = "what the agent needs in order to report"),
        (status = CONFLICT, response = super::openapi::Conflict),
        (status = UNPROCESSABLE_ENTITY, response = super::openapi::Unprocessable),
    ),
)]
pub(super) async fn enroll(
    State(gateway): State<Arc<Gateway>>,
    visitor: Visitor,
    Query(NoParameters {}): Query<NoParameters>,
    Json(agent): Json<NewAgent>,
) -> Result<(StatusCode, axum::Json<Enrolled>), Problem> {
    let context = visitor
        .context(&gateway, AgentsEnroll::INFO.kind)
        .with_fresh_key();
    let enrollment = enrollment::Enrollment {
        token: agent.token,
        instance_id: agent.instance_id,
        public_key: agent.public_key,
        platform: agent.platform,
    };
    let enrolled = gateway.call::<AgentsEnroll>(&context, &enrollment).await;
    let enrolled = enrolled.map_err(|fault| match fault.kind {
        // The gateway has checked everything that the schema expresses.
        FaultKind::Invalid => Problem::agent(fault.message),
        _ => fault.into(),
    })?;
    Ok((StatusCode::CREATED, axum::Json(enrolled.into())))
}

/// List enrolled agents
#[utoipa::path(
    get, path = "/agents", tag = "agents", operation_id = "list_agents", params(AgentsQuery),
    responses((status = OK, body = EnrolledAgents, description = "a page of agents")),
)]
pub(super) async fn list(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Query(AgentsQuery { after, limit }): Query<AgentsQuery>,
) -> Result<axum::Json<EnrolledAgents>, Problem> {
    let page = AgentPage {
        after,
        limit: page_limit(limit),
    };
    let list = caller.ask::<AgentsList>(&gateway, &page).await?;
    let agents: Vec<EnrolledAgent> = list.agents.into_iter().map(EnrolledAgent::from).collect();
    let next = agents
        .last()
        .filter(|_| list.more)
        .map(|agent| agent.instance_id.clone());
    Ok(axum::Json(EnrolledAgents { agents, next }))
}

/// Revoke an agent
///
/// The key of the agent is refused from then on, and its connections end within a second. The history of the VM is
/// kept, and the VM can be enrolled again with a new join token.
#[utoipa::path(
    delete, path = "/agents/{instance_id}", tag = "agents", operation_id = "revoke_agent",
    params(("instance_id" = InstanceId, Path, description = "VM id")),
    responses((status = NO_CONTENT, description = "the key of the agent is revoked")),
)]
pub(super) async fn revoke(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(instance_id): Path<InstanceId>,
    Query(NoParameters {}): Query<NoParameters>,
) -> Result<StatusCode, Problem> {
    caller
        .ask::<AgentsRevoke>(&gateway, &AgentRef { instance_id })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}
