//! Serves the OpenAPI document, which is generated from the types of the REST routes, and the Swagger UI.

use axum::{
    Router,
    http::{HeaderValue, header},
    middleware::map_response,
    response::Response,
    routing::get,
};
use utoipa::{
    OpenApi, PartialSchema, ToResponse,
    openapi::{
        Components, Content, HeaderBuilder, ObjectBuilder, OpenApi as Document, PathItem, Ref, RefOr,
        ResponseBuilder, Type,
        path::Operation,
        security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme},
    },
};
use utoipa_swagger_ui::{Config, SwaggerUi};
use vmwatch_api::{
    process_search::ProcessMatch,
    processes::{Order, ProcessName, ProcessSort},
    rows::RowKind,
    vms::{AgentFilter, VmSort},
};

use super::{
    caller::PLAIN_COOKIE,
    cursors::RowCursor,
    events::{HypervisorSampleEvent, MachineEvent, ProcessesEvent, RemovedEvent, SampleEvent},
    problem::{PROBLEM_JSON, ProblemDocument},
    rows::RowFormat,
    samples::{Format, Source},
};

/// Path of the OpenAPI document.
const DOCUMENT: &str = "/api/openapi.json";
/// Path of the Swagger UI.
const PAGE: &str = "/api/docs";
/// Content security policy of the Swagger UI: like that of the web page, but allows inline styles, which Swagger UI
/// needs.
const PAGE_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; \
     connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";

#[derive(OpenApi)]
#[openapi(
    info(
        title = "vmwatch",
        description = "Monitors the virtual machines of a private cloud and every process inside them, and controls \
                       their power state.",
    ),
    security(("bearer" = []), ("cookie" = [])),
    components(schemas(
        // These types occur only in parameters, whose schemas utoipa does not collect from the routes.
        AgentFilter, Format, Order, ProcessMatch, ProcessName, ProcessSort, RowCursor, RowFormat, RowKind, Source, VmSort,
        // These types are the data of live events, which no route references.
        SampleEvent, HypervisorSampleEvent, ProcessesEvent, MachineEvent, RemovedEvent,
    )),
    tags(
        (name = "sessions", description = "Logging in and out"),
        (name = "vms", description = "List of VMs and history of their measures"),
        (name = "processes", description = "Processes of a VM, now and at earlier times, and the VMs in which a process ran"),
        (name = "operations", description = "Starting, stopping and rebooting VMs, and the results"),
        (name = "events", description = "Live events: new samples, operations, alerts and state changes of VMs"),
        (name = "users", description = "User management, for administrators"),
        (name = "tokens", description = "API tokens, with which programs use this API"),
        (name = "agents", description = "Enrolment of agents with join tokens, and revocation of their keys"),
        (name = "audit", description = "The audit log, for administrators"),
        (name = "status", description = "The state of vmwatch itself, for administrators"),
        (name = "alerts", description = "Alerts, their rules and silences, and the channels that they notify"),
    ),
)]
struct Base;

/// The OpenAPI document without its routes.
pub(super) fn base() -> Document {
    let mut document = Base::openapi();
    let components = document.components.get_or_insert_with(Components::new);
    let bearer = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .description(Some("The token returned by `POST /api/v1/sessions`, or an API token returned by `POST /api/v1/tokens`."));
    components.add_security_scheme("bearer", SecurityScheme::Http(bearer.build()));
    let cookie = "The session cookie of the web page. Requests other than GET must come from the same origin: \
                  `Sec-Fetch-Site: same-origin`, or an `Origin` header that matches the request's host, \
                  which a trusted proxy reports in `X-Forwarded-Host`.";
    let cookie = ApiKeyValue::with_description(PLAIN_COOKIE, cookie);
    components.add_security_scheme("cookie", SecurityScheme::ApiKey(ApiKey::Cookie(cookie)));
    components
        .schemas
        .insert("Problem".to_owned(), ProblemDocument::schema());
    for (name, response) in [
        Conflict::response(),
        Contradictory::response(),
        Unprocessable::response(),
    ] {
        components.responses.insert(name.to_owned(), response);
    }
    for (status, name, description) in FAILURES {
        components
            .responses
            .insert(name.to_owned(), failure(status, description).into());
    }
    document
}

/// Adds the error responses and the `X-Request-Id` header to every route.
pub(super) fn complete(document: &mut Document) {
    for (path, item) in &mut document.paths.paths {
        for operation in operations(item) {
            for response in operation.responses.responses.values_mut() {
                if let RefOr::T(response) = response {
                    response
                        .headers
                        .insert("X-Request-Id".to_owned(), request_id().into());
                }
            }
            for (status, name, _) in FAILURES {
                if may_fail(path, operation, status) {
                    let failure = RefOr::Ref(Ref::from_response_name(name));
                    operation.responses.responses.insert(status.to_owned(), failure);
                }
            }
        }
    }
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    [
        &mut item.get,
        &mut item.put,
        &mut item.post,
        &mut item.delete,
        &mut item.patch,
    ]
    .into_iter()
    .flatten()
}

/// Error response (409) of routes whose requests can conflict with the current state of the resource.
#[derive(Debug)]
pub(super) struct Conflict;

impl<'a> ToResponse<'a> for Conflict {
    fn response() -> (&'a str, RefOr<utoipa::openapi::Response>) {
        let description = "The resource is in a state that does not allow the request.";
        ("Conflict", failure("409", description).into())
    }
}

/// Error response of routes whose parameters may be valid individually but conflict with each other.
#[derive(Debug)]
pub(super) struct Contradictory;

impl<'a> ToResponse<'a> for Contradictory {
    fn response() -> (&'a str, RefOr<utoipa::openapi::Response>) {
        let description = "The parameters are valid individually but conflict with each other; `detail` explains how to fix it.";
        ("Contradictory", failure("422", description).into())
    }
}

/// Error response (422) of routes whose request body may break a rule that a schema cannot express.
#[derive(Debug)]
pub(super) struct Unprocessable;

impl<'a> ToResponse<'a> for Unprocessable {
    fn response() -> (&'a str, RefOr<utoipa::openapi::Response>) {
        let description = "A value breaks a rule that the schema cannot express; `detail` states the rule.";
        ("Unprocessable", failure("422", description).into())
    }
}

/// Error responses that are common to all routes: status, component name and description.
const FAILURES: [(&str, &str, &str); 11] = [
    (
        "400",
        "Invalid",
        "The request is invalid; `detail` explains how to fix it.",
    ),
    (
        "401",
        "Unauthenticated",
        "The session is missing or has expired, or the API token is not valid.",
    ),
    (
        "403",
        "Forbidden",
        "The user's role or the API token does not allow the request.",
    ),
    (
        "404",
        "NotFound",
        "The resource does not exist, or the user is not allowed to see it.",
    ),
    ("408", "Slow", "The request body was received too slowly."),
    ("413", "TooLarge", "The request body is too large."),
    ("415", "NotJson", "The request body is not JSON."),
    (
        "429",
        "Throttled",
        "Too many requests; retry after the seconds in `Retry-After`.",
    ),
    (
        "500",
        "Internal",
        "An internal error occurred; details are in the server log.",
    ),
    (
        "503",
        "Unavailable",
        "A required service is unreachable or overloaded; retry after the seconds in `Retry-After`.",
    ),
    (
        "504",
        "Timeout",
        "The request was not completed within its time limit.",
    ),
];

fn may_fail(path: &str, operation: &Operation, status: &str) -> bool {
    match status {
        "404" => path.contains('{'),
        "408" | "413" | "415" => operation.request_body.is_some(),
        _ => true,
    }
}

fn failure(status: &str, description: &str) -> utoipa::openapi::Response {
    let content = Content::new(Some(Ref::from_schema_name("Problem")));
    let mut response = ResponseBuilder::new()
        .description(description)
        .content(PROBLEM_JSON, content)
        .header("X-Request-Id", request_id());
    if matches!(status, "429" | "503") {
        let seconds = ObjectBuilder::new().schema_type(Type::Integer).minimum(Some(1));
        let header = HeaderBuilder::new()
            .schema(Some(seconds))
            .description(Some("Seconds to wait before retrying the request."));
        response = response.header("Retry-After", header.build());
    }
    response.build()
}

fn request_id() -> utoipa::openapi::Header {
    HeaderBuilder::new()
        .schema(Some(ObjectBuilder::new().schema_type(Type::String)))
        .description(Some("The request ID, as in the logs."))
        .build()
}

/// Serves the OpenAPI document and the Swagger UI.
pub(super) fn serve<S: Clone + Send + Sync + 'static>(document: &Document) -> Router<S> {
    // Encoding the OpenAPI document as JSON cannot fail.
    let json = serde_json::to_string(document).unwrap_or_default();
    let document = get(async move || ([(header::CONTENT_TYPE, "application/json")], json.clone()));
    let page = SwaggerUi::new(PAGE).config(Config::from(DOCUMENT));
    Router::new()
        .merge(page)
        .layer(map_response(with_policy))
        .route(DOCUMENT, document)
}

async fn with_policy(mut response: Response) -> Response {
    let policy = HeaderValue::from_static(PAGE_POLICY);
    response
        .headers_mut()
        .insert(header::CONTENT_SECURITY_POLICY, policy);
    response
}
