//! The answer to a NATS server: a JWT with the permissions of the agent, inside of a JWT that is addressed to the server.

use std::time::Duration;

use nkeys::KeyPair;
use serde_json::json;
use vmwatch_api::{
    InstanceId,
    agents::status_subject,
    enrollment::AgentKey,
    metrics::{SAMPLE_MESSAGE_BYTES, SAMPLE_SUBJECT_PREFIX},
    time::unix_millis,
};
use vmwatch_bus::{inbox_prefix, random_id};
use vmwatch_service::jitter::jittered;

use super::{
    jwt::{self, JwtError},
    request::Login,
};

/// The NATS account of agents, in deploy/nats/accounts.conf.
pub(super) const ACCOUNT: &str = "AGENTS";
/// The version of the claims.
const VERSION: u8 = 2;
/// The longest validity of a login, 28.8 hours; the shortest is two thirds of it. NATS then closes the connection and the
/// agent logs in again. The validity is random, so that the agents do not return at the same time.
const LONGEST: Duration = Duration::from_mins(24 * 60 * 12 / 10);
const SHORTEST_SHARE: f64 = 2.0 / 3.0;
/// NATS 2.15 does not enforce these two limits of a JWT, but the equal ones of the account.
const MAX_SUBSCRIPTIONS: u8 = 5;
const MAX_PAYLOAD: usize = SAMPLE_MESSAGE_BYTES;

/// The answer that lets the client in as the agent of this VM.
pub(super) fn grant(login: &Login, vm: &InstanceId, issuer: &KeyPair) -> Result<String, JwtError> {
    let now = unix_millis() / 1000;
    let iss = issuer.public_key();
    let user = json!({
        "jti": random_id(),
        "iat": now,
        "exp": now + jittered(LONGEST, SHORTEST_SHARE).as_secs(),
        "iss": iss,
        "sub": login.user_nkey,
        "aud": ACCOUNT,
        // With a `name`, NATS would show the connection under the name instead of the key, and a revocation would not find
        // it.
        "nats": {
            "pub": { "allow": [format!("{SAMPLE_SUBJECT_PREFIX}{vm}"), status_subject(vm)] },
            "sub": { "allow": [inbox(&login.key)] },
            "subs": MAX_SUBSCRIPTIONS,
            "data": -1,
            "payload": MAX_PAYLOAD,
            "allowed_connection_types": ["STANDARD", "WEBSOCKET"],
            "type": "user",
            "version": VERSION,
        },
    });
    let answer = json!({
        "jti": random_id(),
        "iat": now,
        "iss": iss,
        "sub": login.user_nkey,
        "aud": login.server,
        "nats": { "jwt": jwt::sign(&user, issuer)?, "type": "authorization_response", "version": VERSION },
    });
    jwt::sign(&answer, issuer)
}

/// The subjects at which an agent receives replies.
fn inbox(key: &AgentKey) -> String {
    format!("{}.>", inbox_prefix(key.as_str()))
}
