//! The `setup` command of each program that owns JetStream streams. It creates the streams or changes them as
//! configured, and can be repeated.

use std::time::Duration;

use async_nats::jetstream::{consumer::pull, stream::Info};
use vmwatch_api::{
    Service,
    audit::{AuditRecord, AuditResult},
    time::unix_millis,
};
use vmwatch_service::cli;

use super::{
    DEADLINE, ProvisionError, Wanted, consumer_name, create_stream,
    difference::{Difference, differences, listed, losses},
    failed, find_consumer, find_stream,
};
use crate::{
    Bus, BusError, BusSettings,
    audit::{Audit, action},
    jetstream::Existing,
    random_id,
};

/// The result for a stream or consumer that already has the wanted configuration.
const LEFT: &str = "left as it was";
/// How long the `setup` command waits for the NATS server to start.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy, clap::Args)]
pub struct SetupArguments {
    /// Also make changes that delete stored messages, such as a size limit below a stream's present size.
    #[arg(long)]
    allow_data_loss: bool,
}

/// Why the `setup` command failed.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    #[error(transparent)]
    Bus(#[from] BusError),
    #[error(transparent)]
    Provision(#[from] ProvisionError),
    /// The change would delete stored messages.
    #[error(
        "nothing was changed, because the change would delete stored messages; to proceed, repeat the command with --allow-data-loss:\n{0}"
    )]
    WouldDelete(String),
}

/// Runs the `setup` command and prints the result for each stream and consumer.
pub async fn run(
    owner: Service,
    settings: &BusSettings,
    wanted: &[Wanted],
    arguments: SetupArguments,
) -> Result<(), SetupError> {
    let bus = Bus::connect_within(&format!("{}-setup", owner.name()), settings, CONNECT_LIMIT).await?;
    let outcome = setup(&bus, wanted, arguments).await;
    for done in outcome.as_deref().unwrap_or_default() {
        println!("{}: {}", done.name, done.what);
    }
    if let Some((result, detail)) = audited(&outcome) {
        append(&bus, owner, result, detail).await;
    }
    outcome.map(drop)
}

/// The result of the `setup` command for the audit; `None` if nothing was changed.
fn audited(outcome: &Result<Vec<Done>, SetupError>) -> Option<(AuditResult, String)> {
    let all = match outcome {
        Ok(all) => all,
        Err(error) => return Some((AuditResult::Failed, error.to_string())),
    };
    let made = all.iter().filter(|done| done.what != LEFT);
    let made: Vec<_> = made.map(|done| format!("{}: {}", done.name, done.what)).collect();
    (!made.is_empty()).then(|| (AuditResult::Succeeded, made.join("; ")))
}

/// Appends the audit record of the `setup` command. The record follows the change, because the command of vmwatch-auth
/// creates the audit stream in the first place.
async fn append(bus: &Bus, owner: Service, result: AuditResult, detail: String) {
    let record = AuditRecord {
        at_ms: unix_millis(),
        action: action(owner, "setup"),
        user: owner.name().to_owned(),
        api_token: None,
        source: Some(cli::invoker()),
        target: None,
        request_id: random_id(),
        operation_id: None,
        result,
        detail,
    };
    if let Err(error) = Audit::new(bus, false).append(&record, &record.request_id).await {
        eprintln!("this command could not be recorded in the audit: {error}");
    }
}

/// The change that a stream or consumer needs to have the wanted configuration.
enum Work {
    Make,
    Change(Vec<Difference>),
    Leave,
}

/// The result of the `setup` command for one stream or consumer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done {
    pub name: String,
    /// A description for the operator: `created`, `left as it was`, or the list of changes.
    pub what: String,
    /// Whether an existing stream or consumer was changed.
    pub changed: bool,
}

/// Creates or changes the streams and consumers as configured. If any of the changes would delete stored messages and
/// the arguments do not allow it, no change is made.
pub async fn setup(bus: &Bus, wanted: &[Wanted], arguments: SetupArguments) -> Result<Vec<Done>, SetupError> {
    let mut found = Vec::new();
    let mut refusals = Vec::new();
    for one in wanted {
        let stream = find_stream(bus, &one.stream.name).await?;
        if let Some(stream) = &stream {
            let losses = losses(&one.stream, stream);
            refusals.extend(losses.iter().map(|loss| format!("{}: {loss}", one.stream.name)));
        }
        found.push((one, stream));
    }
    if !refusals.is_empty() && !arguments.allow_data_loss {
        return Err(SetupError::WouldDelete(refusals.join("\n")));
    }
    let mut all = Vec::new();
    for (wanted, found) in found {
        all.push(settle_stream(bus, wanted, found).await?);
        for consumer in &wanted.consumers {
            all.push(settle_consumer(bus, &wanted.stream.name, consumer).await?);
        }
    }
    Ok(all)
}

async fn settle_stream(bus: &Bus, wanted: &Wanted, found: Option<Info>) -> Result<Done, ProvisionError> {
    let mut config = wanted.stream.clone();
    let name = config.name.clone();
    let Some(found) = found else {
        create_stream(bus, &config).await?;
        return Ok(Done::new(name, &Work::Make));
    };
    let existing = found.config;
    let work = Work::from_differences(differences(&config, &existing)?);
    if let Work::Change(_) = work {
        config.metadata = existing.metadata;
        config.placement = existing.placement;
        let updated = bus.update_stream(&config, DEADLINE).await;
        updated.map_err(|error| failed(&name, error))?;
    }
    Ok(Done::new(name, &work))
}

async fn settle_consumer(bus: &Bus, stream: &str, wanted: &pull::Config) -> Result<Done, ProvisionError> {
    let name = consumer_name(wanted);
    let work = match find_consumer(bus, stream, name).await? {
        None => Work::Make,
        Some(found) => Work::from_differences(differences(wanted, &found.config)?),
    };
    if !matches!(work, Work::Leave) {
        let making = bus.create_consumer(stream, wanted.clone(), Existing::Update, DEADLINE);
        making.await.map_err(|error| failed(name, error))?;
    }
    Ok(Done::new(name.to_owned(), &work))
}

impl Work {
    fn from_differences(differences: Vec<Difference>) -> Self {
        if differences.is_empty() {
            Self::Leave
        } else {
            Self::Change(differences)
        }
    }
}

impl Done {
    fn new(name: String, work: &Work) -> Self {
        let what = match work {
            Work::Make => "created".to_owned(),
            Work::Change(differences) => format!("changed: {}", listed(differences)),
            Work::Leave => LEFT.to_owned(),
        };
        Self {
            name,
            what,
            changed: matches!(work, Work::Change(_)),
        }
    }
}
