//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::{error::EXIT_CODES, time::FORMS};

const ENVIRONMENT: &str = "\
Environment:
  VMWATCH_CONFIG      configuration file; default $XDG_CONFIG_HOME/vmwatch/config.toml
  VMWATCH_CONTEXT     context to use, like --context
  VMWATCH_URL         gateway to use instead of a context, like --url
  VMWATCH_TOKEN       API token or session token
  VMWATCH_TOKEN_FILE  file that contains a token, like --token-file
  VMWATCH_CA_FILE     certificate authorities of the gateway, like --ca-file
  NO_COLOR            if set, no colours
  TZ                  time zone of the times that are read and shown

TIME is one of: ";

/// The arguments of `vmwatch`.
#[derive(Debug, Parser)]
#[command(
    name = "vmwatch",
    version,
    about = "Show the VMs of a vmwatch deployment and their processes, now and in the past",
    after_help = format!("{ENVIRONMENT}{FORMS}\n\n{EXIT_CODES}"),
    propagate_version = true
)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Context of the configuration file to use instead of the current one
    #[arg(long, global = true, value_name = "NAME", conflicts_with = "url")]
    pub(crate) context: Option<String>,
    /// URL of the gateway to use instead of a context; the tokens of contexts are not sent to it
    #[arg(long, global = true, value_name = "URL")]
    pub(crate) url: Option<String>,
    /// File that contains an API token or session token; - for the standard input
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// File with the certificate authorities of the gateway in PEM; default: those of the system
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) ca_file: Option<PathBuf>,
    /// Print the answers of the REST API as JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Whether to use colours; auto: on a terminal
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto")]
    pub(crate) color: Color,
    /// Do not cut lines to the width of the terminal
    #[arg(long, global = true)]
    pub(crate) wide: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Color {
    Auto,
    Always,
    Never,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Sign in to a gateway and keep the session in the configuration file
    Login(Login),
    /// End the session of the context and remove its token from the configuration file
    Logout,
    /// List, choose or remove the contexts of the configuration file
    #[command(subcommand)]
    Context(ContextCommand),
    /// Print a script that completes arguments, such as: source <(vmwatch completion bash)
    Completion {
        /// Shell for which to print the script
        shell: Shell,
    },
    #[command(flatten)]
    Request(Request),
}

/// Commands that need a session or a token.
#[derive(Debug, Subcommand)]
pub(crate) enum Request {
    /// List VMs
    Vms(Vms),
    /// Show the processes of a VM in a live table; the left and right arrow keys step through the past
    Top(Top),
    /// List the processes of a VM at a moment
    Ps(Ps),
    /// Find the VMs in which a process ran
    WhoRan(WhoRan),
    /// Show the history of a VM, or of its processes with a name
    History(History),
    /// Compare the processes of a VM at two moments: which came, went and grew
    Changed(Changed),
    /// Start or resume a VM
    Start(Act),
    /// Ask the guest of a VM to shut down
    Stop(ForcedAct),
    /// Ask the guest of a VM to reboot
    Reboot(ForcedAct),
    /// List actions on VMs and their results
    Operations(Operations),
    /// List alerts that are pending, firing or acknowledged
    Alerts(Alerts),
    /// Follow live events until interrupted
    Events(Events),
    /// Show the state of vmwatch itself; for administrators
    Status,
}

#[derive(Debug, Args)]
pub(crate) struct Login {
    /// URL of the gateway; default: that of the context
    #[arg(value_name = "URL")]
    pub(crate) gateway: Option<String>,
    /// Name of the user; default: the name of the user of this machine
    #[arg(long, short)]
    pub(crate) user: Option<String>,
    /// File that contains the password; - for the standard input. Default: asks in the terminal
    #[arg(long, value_name = "FILE")]
    pub(crate) password_file: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ContextCommand {
    /// List the contexts
    List,
    /// Use this context from now on
    Use {
        /// Name of the context
        name: String,
    },
    /// Remove a context and its token; its session does not end
    Remove {
        /// Name of the context
        name: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Vms {
    /// Only VMs with this text in id, name, hypervisor or a label
    #[arg(value_name = "TEXT")]
    pub(crate) search: Option<String>,
    /// Only VMs in this state, such as `running` or `shut_off`
    #[arg(long)]
    pub(crate) state: Option<String>,
    /// Only VMs with an agent in this state: reporting, silent, never or faulty
    #[arg(long)]
    pub(crate) agent: Option<String>,
    /// Only VMs of this hypervisor
    #[arg(long, value_name = "NAME")]
    pub(crate) hypervisor: Option<String>,
    /// Only VMs with this label: KEY or KEY=VALUE
    #[arg(long)]
    pub(crate) label: Option<String>,
    /// Sort by id, name, hypervisor, state, cpu, mem, disk, net or `last_report`
    #[arg(long, value_name = "KEY", default_value = "name")]
    pub(crate) sort: String,
    #[command(flatten)]
    pub(crate) limit: Limit,
}

/// Number of items in a list.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Limit {
    /// Maximum number of lines, 1 to 100000
    #[arg(long, short = 'n', value_name = "NUMBER", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    limit: u32,
}

impl Limit {
    pub(crate) fn get(self) -> usize {
        usize::try_from(self.limit).unwrap_or(usize::MAX)
    }
}

#[derive(Debug, Args)]
pub(crate) struct Top {
    /// Id or name of the VM
    pub(crate) vm: String,
    /// Moment to begin with; default: live
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    pub(crate) at: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Ps {
    /// Id or name of the VM
    pub(crate) vm: String,
    /// Moment for which to list the processes; default: now
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    pub(crate) at: Option<String>,
    /// Sort by cpu, mem, disk, pid or name
    #[arg(long, value_name = "KEY", default_value = "cpu")]
    pub(crate) sort: String,
    /// Only processes with exactly this name
    #[arg(long)]
    pub(crate) name: Option<String>,
    #[command(flatten)]
    pub(crate) limit: Limit,
}

/// A time range.
#[derive(Debug, Args)]
pub(crate) struct Range {
    /// Start of the time range
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    pub(crate) from: Option<String>,
    /// End of the time range; default: now
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    pub(crate) to: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct WhoRan {
    /// Name of the process
    pub(crate) name: String,
    /// Find names that begin with NAME, which then has at least 3 characters
    #[arg(long)]
    pub(crate) prefix: bool,
    #[command(flatten)]
    pub(crate) range: Range,
    #[command(flatten)]
    pub(crate) limit: Limit,
}

#[derive(Debug, Args)]
pub(crate) struct History {
    /// Id or name of the VM
    pub(crate) vm: String,
    /// Show the sum of the processes with this name instead of the VM
    #[arg(long, value_name = "NAME")]
    pub(crate) process: Option<String>,
    #[command(flatten)]
    pub(crate) range: Range,
    /// Maximum number of lines, 1 to 2000
    #[arg(long, value_name = "NUMBER", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=2000))]
    pub(crate) points: u32,
}

#[derive(Debug, Args)]
pub(crate) struct Changed {
    /// Id or name of the VM
    pub(crate) vm: String,
    #[command(flatten)]
    pub(crate) range: Range,
    /// Maximum number of lines of each kind of change, 1 to 1000
    #[arg(long, short = 'n', value_name = "NUMBER", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) limit: u32,
}

#[derive(Debug, Args)]
pub(crate) struct Act {
    /// Id or name of the VM
    pub(crate) vm: String,
    /// Wait until the operation has ended; exit code 1 if it failed
    #[arg(long)]
    pub(crate) wait: bool,
    /// Hypervisor that is to carry out the action; required if several have the VM
    #[arg(long, value_name = "NAME")]
    pub(crate) hypervisor: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct ForcedAct {
    #[command(flatten)]
    pub(crate) act: Act,
    /// Do not ask the guest: power off, or press the reset button
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Operations {
    /// Only operations on this VM
    #[arg(long)]
    pub(crate) vm: Option<String>,
    /// Only operations in this state: requested, running, succeeded, failed, `timed_out` or
    /// `outcome_unknown`
    #[arg(long)]
    pub(crate) state: Option<String>,
    /// Maximum number of lines, 1 to 100000
    #[arg(long, short = 'n', value_name = "NUMBER", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) limit: u32,
}

#[derive(Debug, Args)]
pub(crate) struct Alerts {
    /// Only alerts of this VM
    #[arg(long)]
    pub(crate) vm: Option<String>,
    /// Only alerts in this state: pending, firing, acknowledged or resolved
    #[arg(long)]
    pub(crate) state: Option<String>,
    /// Only alerts of this severity: info, warning or critical
    #[arg(long)]
    pub(crate) severity: Option<String>,
    #[command(flatten)]
    pub(crate) limit: Limit,
}

#[derive(Debug, Args)]
pub(crate) struct Events {
    /// Accepted for familiarity; live events are not stored, so the command always follows them
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Only events of this VM; may be repeated
    #[arg(long)]
    pub(crate) vm: Vec<String>,
    /// Only events of these kinds, separated by commas: sample, `hypervisor_sample`, processes, operation, machine,
    /// removed, alert
    #[arg(long, value_name = "KINDS", default_value = "operation,machine,removed,alert")]
    pub(crate) kind: String,
    /// End after this number of events
    #[arg(long, value_name = "NUMBER")]
    pub(crate) count: Option<u64>,
}
