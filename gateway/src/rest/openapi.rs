//! The OpenAPI document, made from the types of the routes, and its page.

use axum::{
    Router,
    http::{HeaderValue, header},
    middleware::map_response,
    response::Response,
    routing::get,
};
use shared::api::processes::{Order, ProcessName, ProcessSort};
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

use super::{
    caller::PLAIN_COOKIE,
    events::{MachineEvent, ProcessesEvent, SampleEvent},
    problem::{PROBLEM_JSON, ProblemDocument},
    samples::Format,
    sort::VmSort,
};

/// Where the document is.
const DOCUMENT: &str = "/api/openapi.json";
/// Where its page is.
const PAGE: &str = "/api/docs";
/// Swagger UI sets styles on elements, and nothing else beyond its own files.
const PAGE_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; \
     connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";

#[derive(OpenApi)]
#[openapi(
    info(
        title = "vmwatch",
        description = "What the virtual machines of a private cloud and every process inside them are doing, now and \
                       before, and starting and stopping them.",
    ),
    security(("bearer" = []), ("cookie" = [])),
    components(schemas(
        // Of parameters, whose schemas are not collected from the routes.
        Format, Order, ProcessName, ProcessSort, VmSort,
        // Of the data of events, which no route names.
        SampleEvent, ProcessesEvent, MachineEvent,
    )),
    tags(
        (name = "sessions", description = "Logging in and out"),
        (name = "vms", description = "VMs and their past"),
        (name = "processes", description = "The processes of a VM, now and at any moment that is stored"),
        (name = "operations", description = "Starting and stopping VMs, and what became of it"),
        (name = "events", description = "What happens, as it happens"),
        (name = "users", description = "Users, for administrators"),
        (name = "audit", description = "Who did what, for administrators"),
    ),
)]
struct Base;

/// What the document says of no route in particular.
pub(super) fn base() -> Document {
    let mut document = Base::openapi();
    let components = document.components.get_or_insert_with(Components::new);
    let bearer = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .description(Some("The token that `POST /api/v1/sessions` answers."));
    components.add_security_scheme("bearer", SecurityScheme::Http(bearer.build()));
    let cookie = "The page's cookie. Requests other than GET must come from a page of the same address: \
                  `Sec-Fetch-Site: same-origin`, or an `Origin` that is the address asked.";
    let cookie = ApiKeyValue::with_description(PLAIN_COOKIE, cookie);
    components.add_security_scheme("cookie", SecurityScheme::ApiKey(ApiKey::Cookie(cookie)));
    components
        .schemas
        .insert("Problem".to_owned(), ProblemDocument::schema());
    for (name, response) in [Conflict::response(), Contradictory::response()] {
        components.responses.insert(name.to_owned(), response);
    }
    for (status, name, description) in FAILURES {
        components
            .responses
            .insert(name.to_owned(), failure(status, description).into());
    }
    document
}

/// Adds what every route has: the failures, and the header with the request's id.
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

/// The failure of a route that may find a thing in a state that does not allow what it asks.
#[derive(Debug)]
pub(super) struct Conflict;

impl<'a> ToResponse<'a> for Conflict {
    fn response() -> (&'a str, RefOr<utoipa::openapi::Response>) {
        let description = "The thing is in a state that does not allow it.";
        ("Conflict", failure("409", description).into())
    }
}

/// The failure of a route some of whose parameters may contradict each other.
#[derive(Debug)]
pub(super) struct Contradictory;

impl<'a> ToResponse<'a> for Contradictory {
    fn response() -> (&'a str, RefOr<utoipa::openapi::Response>) {
        let description =
            "Each parameter is right, but not beside the others; the detail says how to put it right.";
        ("Contradictory", failure("422", description).into())
    }
}

/// How a route may fail: the status, the name among the components, and what it means.
const FAILURES: [(&str, &str, &str); 11] = [
    (
        "400",
        "Invalid",
        "The request is wrong; the detail says how to put it right.",
    ),
    ("401", "Unauthenticated", "There is no session, or it is over."),
    ("403", "Forbidden", "The role does not allow it."),
    (
        "404",
        "NotFound",
        "There is no such thing, or none that the session may know of.",
    ),
    ("408", "Slow", "The body came too slowly."),
    ("413", "TooLarge", "The body is too large."),
    ("415", "NotJson", "The body is not JSON."),
    ("429", "Throttled", "Too many tries; again after `Retry-After`."),
    ("500", "Internal", "A defect of ours; it is in the log."),
    (
        "503",
        "Unavailable",
        "What the request needs is away or at its limit; again after `Retry-After`.",
    ),
    ("504", "Timeout", "It took too long."),
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
            .description(Some("Seconds to wait before another try."));
        response = response.header("Retry-After", header.build());
    }
    response.build()
}

fn request_id() -> utoipa::openapi::Header {
    HeaderBuilder::new()
        .schema(Some(ObjectBuilder::new().schema_type(Type::String)))
        .description(Some("What the logs name the request."))
        .build()
}

/// Serves the document and its page.
pub(super) fn serve<S: Clone + Send + Sync + 'static>(document: &Document) -> Router<S> {
    // A document of texts and numbers always encodes.
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
