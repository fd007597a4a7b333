//! Load generators, and the baselines that vmwatch is compared with in the same run. `./dev bench` builds and runs it.

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

/// Measures vmwatch on this machine, on real processes that it starts and ends itself.
#[derive(Parser)]
#[command(name = "bench", version)]
struct Arguments {
    #[command(subcommand)]
    bench: Bench,
    /// Write the figures and the machine's description to this file, as JSON
    #[arg(long, global = true, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a report to this file, as Markdown
    #[arg(long, global = true, value_name = "FILE")]
    report: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Bench {
    /// Documents per second from an agent's message into the store, beside the database's own limit
    Ingest(ingest::Options),
    /// The cost of the latest rows at a short and at a long history
    Latest(latest::Options),
    /// Reads through gateway and bus beside a one-process service, Python and Node; memory and start-up
    Gateway(gateway::Options),
    /// Logins beside what the password hash alone allows, and reads beside logins
    Login(login::Options),
    /// What an agent costs the machine that it samples
    Agent(agent::Options),
    /// All of them, as they are by default
    All,
    #[command(hide = true)]
    EchoService,
}

/// A bench with its defaults.
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
            // Written before the longest part as well, so that a run that is broken off there was not for nothing.
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
