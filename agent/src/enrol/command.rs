//! The command `vmwatch-agent enroll`.

use std::{os::unix::fs::MetadataExt, path::PathBuf, time::Duration};

use clap::Args;
use rustix::{
    process::geteuid,
    thread::{set_thread_gid, set_thread_groups, set_thread_uid},
};
use vmwatch_api::InstanceId;

use super::{
    EnrolError, Enrolment, IdentityDir, Request, error::EXIT_CODES, http::GatewayUrl, platform, read_ca_file,
    read_token,
};
use crate::{
    config::{EnrolCommandSettings, product_uuid},
    sample::Roots,
};

/// Number of times that a request is repeated because the gateway limits enrolments.
const THROTTLED_RETRIES: u32 = 4;
/// Longest wait that the gateway may ask for. A longer one ends the command.
const MAX_THROTTLED_WAIT: Duration = Duration::from_mins(1);

/// The arguments of the command. The join token is not among them, because other users can see arguments.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct EnrolArguments {
    /// URL of the gateway, such as <https://vmwatch.example.com>
    #[arg(long, value_name = "URL")]
    gateway: String,
    /// File with the join token; `-` is standard input
    #[arg(long, value_name = "FILE")]
    token_file: PathBuf,
    /// PEM file with the certificate authorities that sign the gateway's certificate, instead of those of the VM
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// Instance id of this VM, instead of `VMWATCH_INSTANCE_ID` and the UUID of the firmware
    #[arg(long, value_name = "ID")]
    instance_id: Option<InstanceId>,
}

/// Enrols this VM, and prints the result. Must be called while the process has a single thread.
pub fn run(arguments: EnrolArguments, settings: EnrolCommandSettings) -> Result<(), EnrolError> {
    let roots = Roots::default();
    let instance_id = match arguments.instance_id.or(settings.instance_id) {
        Some(id) => id,
        None => product_uuid(&roots.sys).map_err(EnrolError::Usage)?,
    };
    let gateway: GatewayUrl = arguments
        .gateway
        .parse()
        .map_err(|error| EnrolError::Usage(format!("--gateway {error}")))?;
    let ca_file = arguments.ca_file.as_deref().map(read_ca_file).transpose()?;
    let token = read_token(&arguments.token_file)?;
    let platform = platform::read(&roots);
    take_user(&settings.dir)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(1)
        .build()
        .map_err(|error| EnrolError::Usage(format!("the program cannot start: {error}")))?;
    let request = || Request {
        gateway: gateway.clone(),
        ca_file: ca_file.clone(),
        token: token.clone(),
        instance_id: instance_id.clone(),
        platform: platform.clone(),
    };
    let outcome = runtime.block_on(enrol(request, &settings.dir));
    // The runtime does not wait for its thread, which may still resolve a name.
    runtime.shutdown_background();
    let Enrolment {
        record,
        clock_warning,
    } = outcome?;
    if let Some(warning) = clock_warning {
        eprintln!("warning: {warning}");
    }
    println!(
        "enrolled {} with the key {}",
        record.instance_id, record.public_key
    );
    println!("NATS servers: {}", record.answer.nats_urls.join(", "));
    Ok(())
}

async fn enrol(request: impl Fn() -> Request, dir: &IdentityDir) -> Result<Enrolment, EnrolError> {
    for _ in 0..THROTTLED_RETRIES {
        match super::enrol(request(), dir).await {
            Err(EnrolError::Throttled { wait, .. }) if wait <= MAX_THROTTLED_WAIT => {
                eprintln!(
                    "the gateway limits enrolments; trying again in {} s",
                    wait.as_secs()
                );
                tokio::time::sleep(wait).await;
            }
            outcome => return outcome,
        }
    }
    super::enrol(request(), dir).await
}

/// If root runs the command, continues as the owner of the folder that has the identity folder: the agent's user. The files
/// then belong to that user, and root never writes to a folder that another user controls.
fn take_user(dir: &IdentityDir) -> Result<(), EnrolError> {
    let parent = dir.path().parent().unwrap_or(dir.path()).to_owned();
    let failed = |source| EnrolError::User {
        path: parent.clone(),
        source,
    };
    let owner = std::fs::metadata(&parent).map_err(failed)?;
    if geteuid().is_root() && owner.uid() != 0 {
        let (user, group) = (
            rustix::process::Uid::from_raw(owner.uid()),
            rustix::process::Gid::from_raw(owner.gid()),
        );
        set_thread_groups(&[group])
            .and_then(|()| set_thread_gid(group))
            .and_then(|()| set_thread_uid(user))
            .map_err(|error| failed(error.into()))?;
    }
    Ok(())
}
