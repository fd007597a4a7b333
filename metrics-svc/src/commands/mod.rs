//! Commands for administrators: load an old database, move its rows into blocks, set their internal date, handle dead
//! letters, rebuild rollups, and print how much space rows take.

mod announce;
mod backfill;
mod compact_flat;
mod dead_letters;
mod load;
mod pack;
mod rebuild;
mod usage;

use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

use clap::Subcommand;
use indicatif::ProgressStyle;
use tokio_util::sync::CancellationToken;
use vmwatch_api::Service;
use vmwatch_bus::{
    Bus,
    audit::Audit,
    provision::setup::{self, SetupArguments},
};
use vmwatch_service::config::{ByteSize, Span};

use crate::{
    MetricsError, config::MetricsSettings, history::Histories, known_vms::KnownVms,
    row_retention::RowRetention, store::RowStore, streams,
};

/// How long a command waits for the labels of VMs, if retention depends on them.
const LABELS_LIMIT: Duration = Duration::from_secs(5);

/// All commands of `vmwatch-metrics` except `serve`.
#[derive(Debug, Subcommand)]
pub enum OperatorCommand {
    /// Load rows of VMs and processes with the documented fields from JSON Lines or JSON arrays, as mongoexport writes
    /// them with or without `--jsonArray`. Loading the same rows again changes nothing. Needs the bus for the audit,
    /// unless `VMWATCH_AUDIT_REQUIRED=false`.
    Load {
        /// Files to load, each with JSON Lines or one JSON array; `-` means standard input.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Rebuild the rollups, the list of VMs and the process names from all rows. Required after rows were written to the
    /// database directly. Requires the bus for its audit record, unless `VMWATCH_AUDIT_REQUIRED=false`.
    Rebuild,
    /// List, replay or discard dead letters (samples that were refused).
    #[command(subcommand)]
    DeadLetters(DeadLettersCommand),
    /// Set the internal date of rows written by the software of 2017, so that retention applies to them. Needs the bus
    /// for the audit, unless `VMWATCH_AUDIT_REQUIRED=false`.
    BackfillDates {
        /// Change nothing; only print how many rows would change, and how many of them are past their retention and
        /// would be deleted.
        #[arg(long)]
        dry_run: bool,
    },
    /// Move the rows of an older database from the flat collections into blocks, which take a hundredth of the space. May
    /// be interrupted and repeated. Rows that no block can hold stay flat and are answered as before. Needs the bus for
    /// the audit, unless `VMWATCH_AUDIT_REQUIRED=false`.
    CompactFlat {
        /// Change nothing; only print how many rows would be moved.
        #[arg(long)]
        dry_run: bool,
        /// Time between writing rows into blocks and deleting them from the flat collections. It must be longer than any
        /// read takes. The default is `VMWATCH_COMPACTION_DELETE_AFTER`, by which reads are limited.
        #[arg(long)]
        delete_after: Option<Span>,
    },
    /// Print how much space the stored rows take, by kind and by VM, and which blocks cannot be read. Changes nothing.
    Usage {
        /// Size of the disk for the rows, such as `500GiB`; prints how many days it lasts if as many rows arrive as in
        /// the last 24 hours.
        #[arg(long)]
        disk: Option<ByteSize>,
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
        /// Do not read the content of the blocks, which is faster but finds no unreadable blocks.
        #[arg(long)]
        no_check: bool,
    },
    /// Create or update this service's streams and consumers on the bus according to the settings; safe to repeat.
    Setup(SetupArguments),
}

/// Commands for dead letters (samples that were refused).
#[derive(Debug, Subcommand)]
pub enum DeadLettersCommand {
    /// List all dead letters, oldest first.
    List {
        /// Print JSON Lines instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Send dead letters to be stored again, after the cause of their refusal was fixed.
    Replay(Selection),
    /// Delete dead letters without storing them.
    Discard(Selection),
}

/// The dead letters on which a command acts.
#[derive(Debug, clap::Args)]
pub struct Selection {
    /// Numbers of the dead letters, as shown by `list`.
    #[arg(required_unless_present = "all")]
    numbers: Vec<u64>,
    /// Select all dead letters.
    #[arg(long, conflicts_with = "numbers")]
    all: bool,
}

impl fmt::Display for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.all {
            return f.write_str("all");
        }
        let numbers: Vec<_> = self.numbers.iter().map(u64::to_string).collect();
        f.write_str(&numbers.join(", "))
    }
}

/// Runs a command of an administrator.
pub async fn run(command: OperatorCommand, settings: &MetricsSettings) -> Result<(), MetricsError> {
    match command {
        OperatorCommand::Load { files } => {
            let load = async |store: &RowStore, histories: &Histories| {
                store.prepare(&settings.retention).await?;
                histories.prepare().await?;
                load::run(store, &histories.agent, &files, settings.rows.offset).await
            };
            let names: Vec<_> = files.iter().map(|file| file.display().to_string()).collect();
            change_rows(settings, "metrics.load", names.join(", "), load).await
        }
        OperatorCommand::Rebuild => {
            let rebuild = async |_: &RowStore, histories: &Histories| {
                histories.prepare().await?;
                rebuild::run(histories).await
            };
            change_rows(settings, "metrics.rebuild", String::new(), rebuild).await
        }
        OperatorCommand::DeadLetters(command) => dead_letters::run(command, settings).await,
        OperatorCommand::Setup(arguments) => {
            let wanted = streams::wanted(settings);
            Ok(setup::run(Service::Metrics, &settings.bus, &wanted, arguments).await?)
        }
        OperatorCommand::CompactFlat {
            dry_run,
            delete_after,
        } => {
            let options = compact_flat::Options {
                dry_run,
                delete_after: delete_after.map_or(settings.compaction.delete_after, |span| span.0),
            };
            let compact = async |store: &RowStore, histories: &Histories| {
                if !dry_run {
                    store.prepare(&settings.retention).await?;
                }
                compact_flat::run(store, &histories.agent, options).await
            };
            if dry_run {
                println!("{}", with_rows(settings, None, compact).await?);
                return Ok(());
            }
            change_rows(settings, "metrics.compact_flat", String::new(), compact).await
        }
        OperatorCommand::Usage { disk, json, no_check } => {
            let options = usage::Options {
                disk,
                json,
                check: !no_check,
            };
            let usage = async |store: &RowStore, histories: &Histories| {
                usage::run(store, &histories.agent, options).await
            };
            println!("{}", with_rows(settings, None, usage).await?);
            Ok(())
        }
        OperatorCommand::BackfillDates { dry_run } => {
            let backfill = async |store: &RowStore, histories: &Histories| {
                backfill::run(store, &histories.agent, &settings.retention, dry_run).await?;
                Ok("every row has a date".to_owned())
            };
            if dry_run {
                return with_rows(settings, None, backfill).await.map(drop);
            }
            change_rows(settings, "metrics.backfill_dates", String::new(), backfill).await
        }
    }
}

/// Runs work that changes rows in the database, with audit records before and after it.
async fn change_rows(
    settings: &MetricsSettings,
    action: &str,
    detail: String,
    work: impl AsyncFnOnce(&RowStore, &Histories) -> Result<String, MetricsError>,
) -> Result<(), MetricsError> {
    let bus = announce::connect(settings).await?;
    let audit = bus.as_ref().map(|bus| Audit::new(bus, settings.audit_required));
    let work = with_rows(settings, bus.as_ref(), work);
    let done = announce::announced(audit.as_ref(), action, detail, work).await?;
    println!("{done}");
    Ok(())
}

/// Runs work on the database and closes the connection afterwards. Without the bus, the labels of VMs are unknown.
async fn with_rows(
    settings: &MetricsSettings,
    bus: Option<&Bus>,
    work: impl AsyncFnOnce(&RowStore, &Histories) -> Result<String, MetricsError>,
) -> Result<String, MetricsError> {
    let store = Arc::new(RowStore::open(&settings.store, &settings.rows).await?);
    let following = CancellationToken::new();
    let vms = bus.filter(|_| !settings.retention_rules.is_empty());
    let vms = vms.map(|bus| KnownVms::follow(bus, &following));
    let known = match &vms {
        Some(vms) => vms.filled(LABELS_LIMIT).await,
        None => settings.retention_rules.is_empty(),
    };
    if !known {
        eprintln!(
            "the labels of VMs cannot be read; rows are kept for the longest time of VMWATCH_RETENTION_RULES"
        );
    }
    let retention = Arc::new(RowRetention::new(settings, vms));
    let histories = Histories::new(&store, &retention, settings.rollups);
    let done = Box::pin(work(&store, &histories)).await;
    following.cancel();
    store.close().await;
    done
}

/// The style of a progress bar.
fn progress_style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
