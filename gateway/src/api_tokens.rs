//! Checks API tokens against in-memory tables, without a request to auth-svc.
//!
//! The tables follow the KV buckets of API tokens and of users ([`vmwatch_bus::follow`]). A request gets the lesser of
//! the token's and its owner's role and scope. While either table is stale, requests with API tokens are refused;
//! sessions do not depend on the table of tokens. The check of an unknown token waits until the table has caught up
//! with its KV bucket, at the same bounded rate as that of an unknown session.

mod table;

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;
use vmwatch_api::{
    Principal,
    api_tokens::{
        API_TOKEN_BUCKET, ApiToken, ApiTokenAccess, ApiTokenId, ApiTokenLabel, ApiTokenUse, ApiTokensUsed,
        MAX_USED_TOKENS, UsedApiToken, UsedApiTokens,
    },
    time::unix_millis,
    wire::{Fault, FaultKind},
};
use vmwatch_bus::{Bus, follow::Follower, users::UserTable};

use self::table::{Known, TokenTable};
use crate::uses::{Reports, Uses};

const REPORTS: Reports<ApiTokensUsed, UsedApiToken> = Reports {
    most: MAX_USED_TOKENS,
    params: |tokens| UsedApiTokens { tokens },
    dropped: "vmwatch_api_token_uses_dropped_total",
};

/// The valid API tokens.
#[derive(Clone)]
pub(crate) struct ApiTokens {
    table: Follower<TokenTable>,
    users: Follower<UserTable>,
    uses: Uses<UsedApiToken>,
}

/// A valid API token, and what it permits now.
#[derive(Debug, Clone)]
pub(crate) struct Grant {
    token: ApiToken,
    known: Arc<Known>,
    principal: Arc<Principal>,
}

impl Grant {
    pub(crate) const fn token(&self) -> &ApiToken {
        &self.token
    }

    pub(crate) const fn id(&self) -> ApiTokenId {
        self.token.id
    }

    /// The owner's name, with the lesser of the token's and the owner's role and scope.
    pub(crate) fn principal(&self) -> &Principal {
        &self.principal
    }

    /// The id and the name of the token, for the audit.
    pub(crate) fn label(&self) -> ApiTokenLabel {
        ApiTokenLabel {
            id: self.token.id,
            name: self.known.record.name.clone(),
        }
    }

    pub(crate) fn access(&self) -> ApiTokenAccess {
        self.known.record.access
    }

    pub(crate) fn expires_at_ms(&self) -> u64 {
        self.known.record.expires_at_ms
    }
}

impl ApiTokens {
    /// Starts the tasks that follow the KV bucket of API tokens and report uses of tokens, until shutdown.
    pub(crate) fn follow(
        bus: &Bus,
        users: Follower<UserTable>,
        stale_after: Duration,
        shutdown: &CancellationToken,
    ) -> Self {
        let table = TokenTable::default();
        Self {
            table: Follower::start(bus, API_TOKEN_BUCKET, stale_after, table, shutdown.clone()),
            users,
            uses: Uses::report(bus, REPORTS, shutdown.clone()),
        }
    }

    /// Returns what a token permits; `None` if it is unknown, revoked or expired, or its owner was removed. The check
    /// counts as a use of the token.
    pub(crate) async fn check(&self, token: &ApiToken, source: Option<&str>) -> Result<Option<Grant>, Fault> {
        let found = self.table.find(|table| table.get(token.id)).await;
        let found = found.map_err(|error| unavailable().caused_by(error))?;
        let now = unix_millis();
        let Some(known) = found.filter(|known| known.record.allows(token, now)) else {
            return Ok(None);
        };
        let user = self.users.find(|table| table.get(&known.owner)).await;
        let user = user.map_err(|error| unavailable().caused_by(error))?;
        let Some(principal) = user.and_then(|user| known.principal(&user)) else {
            return Ok(None);
        };
        if known.is_use_due(now) {
            let last_use = ApiTokenUse {
                at_ms: now,
                source: source.map(str::to_owned),
            };
            self.uses.note(UsedApiToken {
                id: token.id,
                last_use,
            });
        }
        Ok(Some(Grant {
            token: *token,
            known,
            principal,
        }))
    }
}

fn unavailable() -> Fault {
    Fault::new(
        FaultKind::Unavailable,
        "API tokens cannot be checked now; try again shortly",
    )
}
