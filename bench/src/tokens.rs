//! Compares requests with an API token with those with a session.

use std::{sync::Arc, time::Duration};

use clap::Args;
use testkit::{PATIENCE, Program, Stack};
use vmwatch_api::{
    Principal, Role, Scope,
    api_tokens::{ApiTokenAccess, ApiTokensCreate, NewApiToken},
};
use vmwatch_bus::Context;

use crate::{
    gateway::{address, stack},
    load::{self, Load},
    report::{Bound, Report, number},
    sides::{self, Plan, Side, compare, ratios},
    statistics::Series,
};

/// Command-line options of `bench tokens`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Number of measured pairs of rounds
    #[arg(long, default_value_t = 9)]
    pairs: u32,
    /// Duration of a round in seconds
    #[arg(long, default_value_t = 4)]
    seconds: u64,
}

const CONNECTIONS: usize = 64;

pub(crate) async fn run(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let stack = stack()
        .replicas(Program::Metrics, 0)
        .replicas(Program::Lifecycle, 0)
        .start()
        .await;
    report.describe(&stack)?;
    report.section("Requests with an API token");
    report.paragraph(&format!(
        "Each request reads `/api/v1/me`, which the gateway answers without a service, over {CONNECTIONS} connections. Other \
         requests differ less, because they do more work besides the check.",
    ));
    let session = stack.session(Role::Operator, Scope::All).await;
    let token = token(&stack).await?;
    let gateway = stack.replica(Program::Gateway, 0).process.id();
    let side = |name, bearer: &str| -> anyhow::Result<Side> {
        let requests = Arc::new(vec![load::get("/api/v1/me", bearer)]);
        Ok(Side {
            name,
            load: Load::expecting(address(&stack)?, &requests, b"{\"user_name\":"),
            processes: vec![("gateway", gateway)],
        })
    };
    let sides = [side("API token", &token)?, side("session", &session)?];
    let plan = Plan {
        pairs: options.pairs,
        time: Duration::from_secs(options.seconds),
        connections: CONNECTIONS,
    };
    let rounds = compare(&sides, plan).await?;
    sides::tell(report, "api_token", &sides, &rounds);
    let [with_token, with_session] = rounds.as_slice() else {
        anyhow::bail!("one result per side was expected");
    };
    let cpu: Series = ratios(&with_token.cpu, &with_session.cpu);
    report.paragraph(&format!(
        "CPU time of the gateway per request with a token ÷ with a session: {}.",
        number(cpu.median(), 2)
    ));
    report.figure("api_token_cpu_ratio", cpu.median());
    let ratio = ratios(&with_token.per_second, &with_session.per_second).median();
    let text = "requests/s with an API token ÷ with a session";
    report.target("api_token_ratio", text, ratio, 2, Bound::AtLeast(0.95));
    Ok(())
}

/// Creates an API token of the user that owns the session.
async fn token(stack: &Stack) -> anyhow::Result<String> {
    let principal = Principal {
        user: Stack::user_of(Role::Operator, &Scope::All),
        role: Role::Operator,
        scope: Scope::All,
    };
    let new = NewApiToken {
        name: "bench".parse()?,
        valid_seconds: 24 * 3600,
        role: Role::Operator,
        scope: Scope::All,
        access: ApiTokenAccess::Full,
        service_account: None,
    };
    let context = Context::new(PATIENCE).as_principal(principal).with_fresh_key();
    let created = stack.bus.call::<ApiTokensCreate>(&context, &new).await;
    let created = created.map_err(|fault| anyhow::anyhow!("creating a token failed: {fault}"))?;
    Ok(created.token.as_str().to_owned())
}
