//! The REST API (docs/api/rest.md): typed routes that call typed methods on the bus.
//!
//! ```text
//! request ─ middleware (id, span, body) ─ Caller (session or API token) ─ Path, Query, Json ─ handler ─ permit ─ bus
//!            └ problem document on any error
//! ```

mod actions;
mod agents;
mod alerts;
mod api_tokens;
mod audit;
mod caller;
mod cursors;
mod events;
mod extract;
mod filesystems;
mod join_tokens;
mod labels;
mod marks;
mod measures;
mod middleware;
mod open_metrics;
mod openapi;
mod operations;
mod problem;
mod process_changes;
mod process_search;
mod process_top;
mod processes;
mod range;
mod removal;
mod rows;
mod same_origin;
mod samples;
mod sessions;
mod status;
mod time;
mod token_policy;
mod users;
mod vms;

use std::sync::Arc;

use axum::{Router, middleware::from_fn_with_state};
use utoipa::openapi::OpenApi;
use utoipa_axum::{router::OpenApiRouter, routes};

pub(crate) use self::{events::encode as encode_event, middleware::no_such_path};
use crate::{Gateway, install, page};

/// Path prefix of the REST API, with the version of its contract.
const PATH: &str = "/api/v1";

/// Builds the routes of the REST API, its OpenAPI document and the fallback.
pub(crate) fn router(gateway: &Arc<Gateway>) -> Router<Arc<Gateway>> {
    let (routes, document) = routes_and_document();
    routes
        .merge(openapi::serve(&document))
        .merge(install::routes())
        .fallback(page::serve)
        .layer(from_fn_with_state(Arc::clone(gateway), middleware::middleware))
}

/// Returns the OpenAPI document of the REST API.
pub fn document() -> OpenApi {
    routes_and_document().1
}

fn routes_and_document() -> (Router<Arc<Gateway>>, OpenApi) {
    let routes = OpenApiRouter::new()
        .routes(routes!(sessions::login, sessions::list))
        .routes(routes!(sessions::logout))
        .routes(routes!(sessions::end))
        .routes(routes!(sessions::me))
        .routes(routes!(open_metrics::metrics))
        .routes(routes!(vms::list))
        .routes(routes!(vms::get, removal::remove))
        .routes(routes!(labels::get, labels::set))
        .routes(routes!(samples::samples))
        .routes(routes!(rows::rows))
        .routes(routes!(processes::table))
        .routes(routes!(processes::history))
        .routes(routes!(processes::events))
        .routes(routes!(process_top::top))
        .routes(routes!(process_changes::changes))
        .routes(routes!(marks::marks))
        .routes(routes!(filesystems::filesystems))
        .routes(routes!(process_search::search))
        .routes(routes!(actions::act))
        .routes(routes!(actions::act_on_several))
        .routes(routes!(operations::list))
        .routes(routes!(operations::get))
        .routes(routes!(events::follow))
        .routes(routes!(users::list, users::add))
        .routes(routes!(users::get, users::update, users::remove))
        .routes(routes!(users::set_password))
        .routes(routes!(api_tokens::list, api_tokens::create))
        .routes(routes!(api_tokens::revoke))
        .routes(routes!(join_tokens::list, join_tokens::create))
        .routes(routes!(join_tokens::revoke))
        .routes(routes!(agents::enroll, agents::list))
        .routes(routes!(agents::revoke))
        .routes(routes!(audit::list))
        .routes(routes!(status::read))
        .routes(routes!(alerts::list))
        .routes(routes!(alerts::get))
        .routes(routes!(alerts::acknowledge))
        .routes(routes!(alerts::rules::list, alerts::rules::create))
        .routes(routes!(alerts::rules::preview))
        .routes(routes!(
            alerts::rules::get,
            alerts::rules::update,
            alerts::rules::remove
        ))
        .routes(routes!(alerts::silences::list, alerts::silences::create))
        .routes(routes!(alerts::silences::end))
        .routes(routes!(alerts::channels::list, alerts::channels::create))
        .routes(routes!(alerts::channels::names))
        .routes(routes!(alerts::channels::update, alerts::channels::remove))
        .routes(routes!(alerts::channels::test))
        .routes(routes!(alerts::messages::list));
    let (routes, mut document) = OpenApiRouter::with_openapi(openapi::base())
        .nest(PATH, routes)
        .split_for_parts();
    openapi::complete(&mut document);
    (routes, document)
}

#[cfg(test)]
mod tests {
    use std::{env, fs, path::PathBuf};

    #[test]
    fn every_reference_in_openapi_document_resolves() {
        let document = serde_json::to_value(super::document()).unwrap();
        let text = document.to_string();
        let references: Vec<_> = text.split(r##""$ref":"#"##).skip(1).collect();
        assert!(references.len() > 50);
        for reference in references {
            let pointer = reference.split('"').next().unwrap();
            assert!(document.pointer(pointer).is_some(), "{pointer}");
        }
    }

    /// Makes every change of the REST API's contract visible in code review. `VMWATCH_BLESS=1` updates the golden file.
    #[test]
    fn openapi_document_matches_golden_file() {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("openapi.json");
        let generated = super::document().to_pretty_json().unwrap() + "\n";
        if env::var_os("VMWATCH_BLESS").is_some() {
            fs::write(&path, &generated).unwrap();
        }
        let golden = fs::read_to_string(&path).unwrap();
        for (line, (generated, golden)) in generated.lines().zip(golden.lines()).enumerate() {
            assert_eq!(generated, golden, "openapi.json, line {}", line + 1);
        }
        assert_eq!(generated.len(), golden.len());
    }
}
