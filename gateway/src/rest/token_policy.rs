//! Which requests an API token may send. Services decide by role and scope; the gateway refuses the requests below
//! before it calls a service.

use axum::http::Method;
use vmwatch_api::{
    api_tokens::ApiTokenAccess,
    wire::{Fault, FaultKind},
};

use super::PATH;

/// The first segments of the paths below which a token may only read. A token that could make tokens, users or
/// passwords would outlive its own revocation.
const UNCHANGEABLE: [&str; 5] = ["tokens", "users", "join-tokens", "alert-channels", "sessions"];

/// Whether the route answers with the metrics of VMs.
pub(super) fn is_metrics_route(route: &str) -> bool {
    route.strip_prefix(PATH) == Some("/metrics")
}

/// Checks whether a token with this access may send a request with this method to this route, which is the path with
/// placeholders for its parameters.
pub(super) fn check(access: ApiTokenAccess, method: &Method, route: &str) -> Result<(), Fault> {
    let reads = method.is_safe();
    let refused = match access {
        ApiTokenAccess::Full => None,
        ApiTokenAccess::ReadOnly => (!reads).then_some("this API token may only read"),
        ApiTokenAccess::MetricsOnly => {
            let allowed = reads && is_metrics_route(route);
            (!allowed).then_some("this API token may only read the metrics of VMs")
        }
        ApiTokenAccess::Unknown => Some("this gateway does not know the restriction of this API token"),
    };
    let segment = route
        .strip_prefix(PATH)
        .and_then(|path| path.split('/').nth(1))
        .unwrap_or_default();
    let unchangeable = !reads && (segment.is_empty() || UNCHANGEABLE.contains(&segment));
    let refused = refused.or_else(|| {
        unchangeable.then_some(
            "an API token may not change tokens, users, passwords, sessions, join tokens or channels; use a session",
        )
    });
    refused.map_or(Ok(()), |reason| Err(Fault::new(FaultKind::Forbidden, reason)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restricted_tokens_may_only_read() {
        let allows = |access, method: &Method, route| check(access, method, route).is_ok();
        let (vms, metrics) = ("/api/v1/vms/{instance_id}", "/api/v1/metrics");
        let act = "/api/v1/vms/{instance_id}/actions";
        for (access, read, scrape, command) in [
            (ApiTokenAccess::Full, true, true, true),
            (ApiTokenAccess::ReadOnly, true, true, false),
            (ApiTokenAccess::MetricsOnly, false, true, false),
            (ApiTokenAccess::Unknown, false, false, false),
        ] {
            assert_eq!(allows(access, &Method::GET, vms), read, "{access:?}");
            assert_eq!(allows(access, &Method::HEAD, metrics), scrape, "{access:?}");
            assert_eq!(allows(access, &Method::POST, act), command, "{access:?}");
            assert!(!allows(access, &Method::POST, metrics) || access == ApiTokenAccess::Full);
        }
        assert!(!is_metrics_route("/api/v1/metrics/x") && !is_metrics_route("/metrics"));
    }

    #[test]
    fn no_token_may_change_tokens_users_or_channels() {
        for route in [
            "/api/v1/tokens",
            "/api/v1/tokens/{token_id}",
            "/api/v1/users/{user_name}/password",
            "/api/v1/join-tokens",
            "/api/v1/alert-channels/{id}/test",
            "/api/v1/sessions/current",
            // A request without a known route.
            "",
        ] {
            for method in [Method::POST, Method::PUT, Method::PATCH, Method::DELETE] {
                assert!(
                    check(ApiTokenAccess::Full, &method, route).is_err(),
                    "{method} {route}"
                );
            }
        }
        assert!(check(ApiTokenAccess::Full, &Method::GET, "/api/v1/users").is_ok());
        assert!(check(ApiTokenAccess::Full, &Method::POST, "/api/v1/alert-rules").is_ok());
    }
}
