//! What an operator does by hand: move an old database over, look after refused samples, give old rows a date.

mod backfill;
mod dead_letters;
mod load;

use std::path::PathBuf;

use clap::Subcommand;

use crate::{MetricsError, config::MetricsSettings, store::RowStore};

/// The commands beside `serve`.
#[derive(Debug, Subcommand)]
pub enum OperatorCommand {
    /// Load rows from JSON Lines in the documented shape; mongoexport's Extended JSON is understood.
    Load {
        /// Files to read; `-` is standard input.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// List, replay or discard samples that were refused.
    #[command(subcommand)]
    DeadLetters(DeadLettersCommand),
    /// Give rows of an older reporter the internal date that retention goes by; those past it are then deleted.
    BackfillDates {
        /// Only count what would change and what would then be past its retention.
        #[arg(long)]
        dry_run: bool,
    },
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

/// Carries out a command.
pub async fn run(command: OperatorCommand, settings: &MetricsSettings) -> Result<(), MetricsError> {
    match command {
        OperatorCommand::Load { files } => {
            let store = RowStore::open(&settings.store, &settings.rows).await?;
            store.prepare(&settings.retention).await?;
            load::run(&store, &files, settings.rows.offset).await
        }
        OperatorCommand::DeadLetters(command) => dead_letters::run(command, settings).await,
        OperatorCommand::BackfillDates { dry_run } => {
            let store = RowStore::open(&settings.store, &settings.rows).await?;
            backfill::run(&store, &settings.retention, dry_run).await
        }
    }
}
