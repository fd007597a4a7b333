//! What an operator does by hand: move an old database over, look after refused samples, give old rows a date.

mod announce;
mod backfill;
mod dead_letters;
mod load;
mod rebuild;

use std::{fmt, path::PathBuf, sync::Arc};

use clap::Subcommand;
use vmwatch_api::Service;
use vmwatch_bus::provision::setup::{self, SetupArguments};

use crate::{MetricsError, config::MetricsSettings, history::History, store::RowStore, streams};

/// The commands beside `serve`.
#[derive(Debug, Subcommand)]
pub enum OperatorCommand {
    /// Load rows from JSON Lines in the documented shape; mongoexport's Extended JSON is understood.
    Load {
        /// Files to read; `-` is standard input.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Make rollups and the list of VMs anew from all rows: after a reporter that writes to the database itself.
    Rebuild,
    /// List, replay or discard samples that were refused.
    #[command(subcommand)]
    DeadLetters(DeadLettersCommand),
    /// Give rows of an older reporter the internal date that retention goes by; those past it are then deleted.
    BackfillDates {
        /// Only count what would change and what would then be past its retention.
        #[arg(long)]
        dry_run: bool,
    },
    /// Make or change this service's streams and consumers as the settings have them; may be repeated.
    Setup(SetupArguments),
}

/// What can be done with refused samples.
#[derive(Debug, Subcommand)]
pub enum DeadLettersCommand {
    /// List them, oldest first.
    List {
        /// As JSON Lines, for scripts.
        #[arg(long)]
        json: bool,
    },
    /// Send them to the store again, once what was wrong is put right.
    Replay(Selection),
    /// Delete them.
    Discard(Selection),
}

/// Which refused samples.
#[derive(Debug, clap::Args)]
pub struct Selection {
    /// Their numbers, as `list` shows them.
    #[arg(required_unless_present = "all")]
    numbers: Vec<u64>,
    /// All of them.
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

/// Carries out a command.
pub async fn run(command: OperatorCommand, settings: &MetricsSettings) -> Result<(), MetricsError> {
    match command {
        OperatorCommand::Load { files } => {
            let load = async |store: &RowStore, history: &History| {
                store.prepare(&settings.retention).await?;
                history.prepare().await?;
                load::run(store, history, &files, settings.rows.offset).await
            };
            let names: Vec<_> = files.iter().map(|file| file.display().to_string()).collect();
            change_rows(settings, "metrics.load", names.join(", "), load).await
        }
        OperatorCommand::Rebuild => {
            let rebuild = async |_: &RowStore, history: &History| {
                history.prepare().await?;
                rebuild::run(history).await
            };
            change_rows(settings, "metrics.rebuild", String::new(), rebuild).await
        }
        OperatorCommand::DeadLetters(command) => dead_letters::run(command, settings).await,
        OperatorCommand::Setup(arguments) => {
            let wanted = streams::wanted(settings);
            Ok(setup::run(Service::Metrics, &settings.bus, &wanted, arguments).await?)
        }
        OperatorCommand::BackfillDates { dry_run } => {
            let backfill = async |store: &RowStore, history: &History| {
                backfill::run(store, history, &settings.retention, dry_run).await?;
                Ok("every row has a date".to_owned())
            };
            if dry_run {
                return with_rows(settings, backfill).await.map(drop);
            }
            change_rows(settings, "metrics.backfill_dates", String::new(), backfill).await
        }
    }
}

/// Changes what is stored in the database, which the audit announces and records.
async fn change_rows(
    settings: &MetricsSettings,
    action: &str,
    detail: String,
    work: impl AsyncFnOnce(&RowStore, &History) -> Result<String, MetricsError>,
) -> Result<(), MetricsError> {
    let audit = announce::open(settings).await?;
    let done = announce::announced(audit.as_ref(), action, detail, with_rows(settings, work)).await?;
    println!("{done}");
    Ok(())
}

/// Does what needs the database, and takes leave of it.
async fn with_rows(
    settings: &MetricsSettings,
    work: impl AsyncFnOnce(&RowStore, &History) -> Result<String, MetricsError>,
) -> Result<String, MetricsError> {
    let store = Arc::new(RowStore::open(&settings.store, &settings.rows).await?);
    let history = History::beside(&store, &settings.retention, settings.rollups);
    let done = work(&store, &history).await;
    store.close().await;
    done
}
