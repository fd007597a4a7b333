//! Benchmarks that compare vmwatch with other implementations side by side. `./dev bench` builds and runs them.

mod agent;
mod alerts;
mod blocks;
mod echo;
mod fleet;
mod footprint;
mod gateway;
mod latest;
mod load;
mod login;
mod machine;
mod peers;
mod report;
mod samples;
mod scrapes;
mod sides;
mod statistics;
mod store;
mod tokens;
mod top;
mod usage;
mod vm_list;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::report::Report;

/// Benchmarks vmwatch on this machine. Starts and stops all processes that it needs.
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
    /// Measure bytes per row, the rate at which samples are stored compared with plain inserts, and reads of long histories
    Store(store::Options),
    /// Measure the time to read the newest rows of VMs with a short and with a long history
    Latest(latest::Options),
    /// Compare reads with a one-process service, Python and Node; measure memory and start-up time
    Gateway(gateway::Options),
    /// Compare logins with password hashing alone; measure the latency of reads during logins
    Login(login::Options),
    /// Compare requests with an API token with those with a session
    Tokens(tokens::Options),
    /// Measure the CPU time and memory of an agent
    Agent(agent::Options),
    /// Measure the list of VMs and the metrics with a large fleet that reports: latency, page requests, memory, hung
    /// hypervisor
    Fleet(vm_list::Options),
    /// Measure alert-svc with a large fleet: CPU time, memory, time from a sample to the message at a receiver
    Alerts(alerts::Options),
    /// Measure `vmwatch top`: time until the first screen, CPU time
    Top(top::Options),
    /// Run all benchmarks with their default options
    All,
    #[command(hide = true)]
    EchoService,
}

/// Parses the options of a benchmark from an empty command line, so that all have their defaults.
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
    let mut report = Report::new(arguments.json, arguments.report);
    match arguments.bench {
        Bench::Store(options) => store::run(&options, &mut report).await?,
        Bench::Latest(options) => latest::run(options, &mut report).await?,
        Bench::Gateway(options) => reads(&options, &mut report).await?,
        Bench::Login(options) => login::run(&options, &mut report).await?,
        Bench::Tokens(options) => tokens::run(&options, &mut report).await?,
        Bench::Agent(options) => agent::run(&options, &mut report).await?,
        Bench::Fleet(options) => vm_list::run(&options, &mut report).await?,
        Bench::Alerts(options) => alerts::run(&options, &mut report).await?,
        Bench::Top(options) => top::run(&options, &mut report).await?,
        Bench::All => {
            reads(&defaults(), &mut report).await?;
            login::run(&defaults(), &mut report).await?;
            tokens::run(&defaults(), &mut report).await?;
            agent::run(&defaults(), &mut report).await?;
            vm_list::run(&defaults(), &mut report).await?;
            alerts::run(&defaults(), &mut report).await?;
            top::run(&defaults(), &mut report).await?;
            store::run(&defaults(), &mut report).await?;
            // Write the results also before the longest benchmark, so that they are not lost if it is interrupted.
            report.save()?;
            latest::run(defaults(), &mut report).await?;
        }
        Bench::EchoService => return echo::serve().await,
    }
    report.save()
}

async fn reads(options: &gateway::Options, report: &mut Report) -> anyhow::Result<()> {
    gateway::run(options, report).await?;
    if options.bus_path_only {
        return Ok(());
    }
    footprint::run(report).await
}
