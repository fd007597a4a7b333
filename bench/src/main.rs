//! Load generators, and baselines that run side by side with vmwatch for comparison. Built and run by `./dev bench`.

mod agent;
mod echo;
mod fleet;
mod footprint;
mod gateway;
mod ingest;
mod latest;
mod load;
mod login;
mod machine;
mod peers;
mod report;
mod sides;
mod statistics;
mod store;
mod usage;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::report::Report;

/// Benchmarks vmwatch on this machine. Starts and stops all the processes that it needs.
#[derive(Parser)]
#[command(name = "bench", version)]
struct Arguments {
    #[command(subcommand)]
    bench: Bench,
    /// Write the results and a description of the machine to this file, as JSON
    #[arg(long, global = true, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a report to this file, as Markdown
    #[arg(long, global = true, value_name = "FILE")]
    report: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Bench {
    /// Rate at which samples are stored, compared with plain database inserts
    Ingest(ingest::Options),
    /// Time to read the latest rows of a VM, with a short and with a long history
    Latest(latest::Options),
    /// Reads compared with a one-process service, Python and Node; memory use and start-up time
    Gateway(gateway::Options),
    /// Logins compared with password hashing alone; latency of reads during logins
    Login(login::Options),
    /// CPU time and memory of an agent
    Agent(agent::Options),
    /// All benchmarks, with their default options
    All,
    #[command(hide = true)]
    EchoService,
}

/// Parses a benchmark's options from no arguments.
#[derive(Parser)]
struct Defaults<Options: clap::Args> {
    #[command(flatten)]
    options: Options,
}

fn defaults<Options: clap::Args>() -> Options {
    Defaults::parse_from(["bench"]).options
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let mut report = Report::default();
    let (json, markdown) = (arguments.json.as_deref(), arguments.report.as_deref());
    match arguments.bench {
        Bench::Ingest(options) => ingest::run(options, &mut report).await?,
        Bench::Latest(options) => latest::run(options, &mut report).await?,
        Bench::Gateway(options) => reads(&options, &mut report).await?,
        Bench::Login(options) => login::run(&options, &mut report).await?,
        Bench::Agent(options) => agent::run(&options, &mut report).await?,
        Bench::All => {
            reads(&defaults(), &mut report).await?;
            login::run(&defaults(), &mut report).await?;
            agent::run(&defaults(), &mut report).await?;
            ingest::run(defaults(), &mut report).await?;
            // Also written before the longest benchmark, so that interrupting it does not lose the results so far.
            report.write(json, markdown)?;
            latest::run(defaults(), &mut report).await?;
        }
        Bench::EchoService => return echo::serve().await,
    }
    report.write(json, markdown)
}

async fn reads(options: &gateway::Options, report: &mut Report) -> anyhow::Result<()> {
    gateway::run(options, report).await?;
    if options.way_only {
        return Ok(());
    }
    footprint::run(report).await
}
