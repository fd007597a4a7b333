//! The commands `vmwatch-auth join-token` and `vmwatch-auth agent`.

use std::{
    io::{self, Write as _},
    time::Duration,
};

use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::json;
use tokio_util::sync::{CancellationToken, DropGuard};
use vmwatch_api::{
    InstanceId, Scope, Service,
    enrollment::{
        AgentPage, AgentRef, AgentSummary, JoinTokenId, JoinTokenRef, JoinTokenSummary, JoinVms, NewJoinToken,
    },
    metrics::Limit,
};
use vmwatch_bus::{Bus, Context, audit::Audit};
use vmwatch_service::config::Span;

use crate::{AuthError, audit, callout::Checks, config::AuthSettings, enrollment::Enrollment};

/// How long a command waits for the NATS server, and how long for each of the KV buckets.
const WAIT_LIMIT: Duration = Duration::from_secs(5);
/// Number of agents that are read at once for the list.
const PAGE: u64 = 1000;

#[derive(Debug, Subcommand)]
pub enum JoinTokenCommand {
    /// Create a join token and print it to standard output; it cannot be shown again.
    Create(NewToken),
    /// List the join tokens that are valid, and those that expired, were revoked or are used up recently.
    List {
        /// Print the join tokens as JSON, for scripts.
        #[arg(long)]
        json: bool,
    },
    /// Revoke a join token; agents that have used it stay enrolled.
    Revoke {
        /// Id of the join token: its part between the first and the second underscore.
        id: JoinTokenId,
    },
}

/// The properties of a join token to be created.
#[derive(Debug, Args)]
pub struct NewToken {
    /// Time for which the token is valid, from 60s to 90d.
    #[arg(long, default_value = "1h")]
    valid_for: Span,
    /// Number of VMs that can be enrolled, from 1 to 10000.
    #[arg(long, default_value_t = 1)]
    uses: u32,
    /// Comma-separated instance ids of the VMs that can be enrolled, up to 100; default: any VM.
    #[arg(long, value_delimiter = ',', conflicts_with = "prefix")]
    instances: Option<Vec<InstanceId>>,
    /// Allow only VMs whose instance ids begin with this text.
    #[arg(long)]
    prefix: Option<InstanceId>,
    /// Allow VMs that have an agent; the key of the old agent is no longer valid then.
    #[arg(long)]
    replace: bool,
}

#[derive(Debug, Subcommand)]
pub enum AgentCommand {
    /// List the agents that enrolled, including those whose keys were revoked.
    List {
        /// Print the agents as JSON, for scripts.
        #[arg(long)]
        json: bool,
    },
    /// Revoke the key of a VM's agent.
    Revoke {
        /// Instance id of the VM.
        instance_id: InstanceId,
    },
}

/// The connection of a command.
struct Connected {
    enrollment: Enrollment,
    audit: Audit,
    context: Context,
    /// Ends the copies in memory when the command ends.
    _following: DropGuard,
}

/// Runs a command on join tokens.
pub async fn join_token(command: JoinTokenCommand, settings: &AuthSettings) -> Result<(), AuthError> {
    match command {
        JoinTokenCommand::Create(new) => {
            let new = new.checked()?;
            Connected::open(settings).await?.create(new).await
        }
        JoinTokenCommand::List { json } => {
            let connected = Connected::open(settings).await?;
            list_tokens(&connected.enrollment.tokens.list().await?, json)
        }
        JoinTokenCommand::Revoke { id } => {
            let Connected {
                enrollment,
                audit,
                context,
                ..
            } = &Connected::open(settings).await?;
            let token = JoinTokenRef { id };
            enrollment.revoke_token(audit, context, &token).await?;
            println!("revoked the join token {}", token.id);
            Ok(())
        }
    }
}

/// Runs a command on agents.
pub async fn agent(command: AgentCommand, settings: &AuthSettings) -> Result<(), AuthError> {
    let connected = Connected::open(settings).await?;
    match command {
        AgentCommand::List { json } => list_agents(&connected.agents().await?, json),
        AgentCommand::Revoke { instance_id } => {
            let agent = AgentRef { instance_id };
            let Connected {
                enrollment,
                audit,
                context,
                ..
            } = &connected;
            let key = enrollment.revoke_agent(audit, context, &agent).await?;
            println!("revoked the key {key} of {}", agent.instance_id);
            Ok(())
        }
    }
}

impl Connected {
    async fn open(settings: &AuthSettings) -> Result<Self, AuthError> {
        let program = format!("{}-enrollment", Service::Auth.name());
        let bus = Bus::connect_within(&program, &settings.bus, WAIT_LIMIT).await?;
        let shutdown = CancellationToken::new();
        let enrollment = Enrollment::follow(&bus, &shutdown, Checks::new().0);
        let filled = tokio::time::timeout(WAIT_LIMIT, enrollment.filled()).await;
        filled.map_err(|_| {
            AuthError::Refused(
                "the KV buckets of join tokens and agents could not be read; start vmwatch-auth, or run `vmwatch-auth setup`"
                    .to_owned(),
            )
        })?;
        Ok(Self {
            enrollment,
            audit: Audit::new(&bus, settings.audit_required),
            context: audit::own_context(),
            _following: shutdown.drop_guard(),
        })
    }

    /// Prints only the token to standard output, so that scripts can read it.
    async fn create(&self, new: NewJoinToken) -> Result<(), AuthError> {
        let created = self
            .enrollment
            .create_token(&self.audit, &self.context, new, true)
            .await?;
        println!("{}", created.token.as_str());
        eprintln!(
            "created the join token {}, valid until {}; it is shown this once",
            created.summary.id,
            date(created.summary.expires_at_ms)
        );
        Ok(())
    }

    async fn agents(&self) -> Result<Vec<AgentSummary>, AuthError> {
        let mut agents = Vec::new();
        let mut page = AgentPage {
            after: None,
            limit: Limit::new(PAGE).unwrap_or_default(),
        };
        loop {
            let list = self.enrollment.agents.list(&page, &Scope::All).await?;
            page.after = list.agents.last().map(|agent| agent.instance_id.clone());
            agents.extend(list.agents);
            if !list.more {
                return Ok(agents);
            }
        }
    }
}

impl NewToken {
    /// Checks the limits as those of a request are checked.
    fn checked(&self) -> Result<NewJoinToken, AuthError> {
        let vms = match (&self.instances, &self.prefix) {
            (Some(instances), _) => JoinVms::Only(instances.clone()),
            (None, Some(prefix)) => JoinVms::Prefix(prefix.clone()),
            (None, None) => JoinVms::Any,
        };
        let seconds = self.valid_for.0.as_secs();
        let new = json!({ "valid_seconds": seconds, "uses": self.uses, "vms": vms, "replace": self.replace });
        serde_json::from_value(new)
            .map_err(|error| AuthError::Refused(format!("invalid join token: {error}")))
    }
}

fn print_json(list: &[impl Serialize]) -> Result<(), AuthError> {
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, list)?;
    writeln!(out)?;
    Ok(())
}

fn list_tokens(tokens: &[JoinTokenSummary], json: bool) -> Result<(), AuthError> {
    if json {
        return print_json(tokens);
    }
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "{:16}  {:11}  {:20}  {:20}  VMS",
        "ID", "USED", "EXPIRES", "CREATED BY"
    )?;
    for token in tokens {
        let vms = match &token.vms {
            JoinVms::Any => "any".to_owned(),
            JoinVms::Only(ids) => ids.iter().map(InstanceId::as_str).collect::<Vec<_>>().join(","),
            JoinVms::Prefix(prefix) => format!("{prefix}*"),
        };
        let used = format!("{}/{}", token.used, token.uses);
        let notes = [
            (token.replace, " (replaces agents)"),
            (token.revoked, " (revoked)"),
        ];
        let notes: String = notes.iter().filter(|note| note.0).map(|note| note.1).collect();
        writeln!(
            out,
            "{:16}  {used:11}  {:20}  {:20}  {vms}{notes}",
            token.id.as_str(),
            date(token.expires_at_ms),
            token.created_by,
        )?;
    }
    Ok(())
}

fn list_agents(agents: &[AgentSummary], json: bool) -> Result<(), AuthError> {
    if json {
        return print_json(agents);
    }
    let ids = agents.iter().map(|agent| agent.instance_id.as_str().len());
    let width = ids.max().unwrap_or(0).max(11);
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "{:width$}  {:20}  {:20}  KEY",
        "INSTANCE ID", "ENROLLED", "REVOKED"
    )?;
    for agent in agents {
        writeln!(
            out,
            "{:width$}  {:20}  {:20}  {}",
            agent.instance_id.as_str(),
            date(agent.enrolled_at_ms),
            agent.revoked_at_ms.map(date).unwrap_or_default(),
            agent.public_key,
        )?;
    }
    Ok(())
}

/// The date of a time in Unix milliseconds, in UTC and without fractions of a second.
fn date(unix_ms: u64) -> String {
    let millis = i64::try_from(unix_ms).unwrap_or(i64::MAX);
    let date = mongodb::bson::DateTime::from_millis(millis / 1000 * 1000);
    date.try_to_rfc3339_string().unwrap_or_default()
}
