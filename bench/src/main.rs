//! Load generators, and the baselines that vmwatch is compared with in the same run. `./dev bench` builds and runs it.

mod fleet;
mod ingest;
mod latest;
mod machine;
mod report;
mod statistics;
mod store;
mod usage;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::report::Report;

/// Measures vmwatch on this machine, on real processes that it starts and ends itself.
#[derive(Parser)]
#[command(name = "bench", version)]
struct Arguments {
    #[command(subcommand)]
    bench: Bench,
    /// Write the figures and the machine's description to this file, as JSON
    #[arg(long, global = true, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Bench {
    /// Documents per second from an agent's message into the store, beside the database's own limit
    Ingest(ingest::Options),
    /// The cost of the latest rows at a short and at a long history
    Latest(latest::Options),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let mut report = Report::default();
    match arguments.bench {
        Bench::Ingest(options) => ingest::run(options, &mut report).await?,
        Bench::Latest(options) => latest::run(options, &mut report).await?,
    }
    report.finish(arguments.json.as_deref())
}
