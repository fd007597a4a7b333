//! REST route with the current measures of all VMs in scope, in the format of OpenMetrics, for Prometheus.

mod families;
mod fleet;
mod text;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::State,
    http::{HeaderMap, HeaderValue, Response, header},
};
use bytes::Bytes;
use futures::stream;
use tokio::{task, time::timeout};
use vmwatch_api::{
    Kind, Method,
    alerts::{AlertFilter, AlertsList},
    current::{CurrentQuery, VmsCurrent},
    metrics::Limit,
    time::unix_millis,
    wire::{Fault, FaultKind},
};
use vmwatch_bus::Context;

use self::{
    fleet::{Fleet, Source, encode},
    text::{MEDIA_TYPE, plain},
};
use super::{
    caller::Caller,
    extract::{NoParameters, Query},
    problem::Problem,
};
use crate::{Gateway, page::lists};

/// Time limit for counting alerts, so that an unresponsive alert-svc does not delay the measures.
const ALERTS_WITHIN: Duration = Duration::from_secs(1);

/// Read metrics for Prometheus
///
/// Returns the current measures of all VMs in scope, their states and agents, and the number of alerts, in the text
/// format of OpenMetrics 1.0. The answer is up to 15 seconds old. If metrics-svc is configured to list processes
/// (`VMWATCH_PROCESS_SERIES`), it also has the greatest processes by name. docs/integrations.md describes the metrics.
#[utoipa::path(
    get, path = "/metrics", tag = "vms", operation_id = "metrics",
    responses((
        status = OK, description = "the metrics, compressed with gzip if the client accepts that",
        content((String = "application/openmetrics-text")),
    )),
)]
pub(super) async fn metrics(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Query(NoParameters {}): Query<NoParameters>,
    headers: HeaderMap,
) -> Result<Response<Body>, Problem> {
    let compute = async {
        let fleet = read(&gateway, &caller.context(&gateway, Kind::Query)).await?;
        let encoded = task::spawn_blocking(move || encode(&fleet)).await;
        encoded.map_err(internal)?.map_err(internal)
    };
    let answering = gateway.scrapes.get(&caller.principal().scope, compute);
    let limit = gateway.deadlines.for_kind(Kind::Query);
    let scrape = timeout(limit, answering).await.map_err(|_| {
        let text = "the metrics were not computed in time; try again";
        Fault::new(FaultKind::Timeout, text)
    })??;
    if scrape.is_shared {
        // A request that computed the answer took a permit for each page.
        let context = caller.context(&gateway, Kind::Query);
        let _permit = gateway.admission.enter(&VmsCurrent::INFO, &context).await?;
    }
    Ok(answer(scrape.gzip, &headers))
}

fn internal(error: impl std::error::Error + Send + Sync + 'static) -> Fault {
    Fault::new(FaultKind::Internal, "an internal error occurred; it was logged").caused_by(error)
}

fn answer(gzip: Bytes, headers: &HeaderMap) -> Response<Body> {
    let is_gzipped = lists(headers, header::ACCEPT_ENCODING, "gzip");
    let body = if is_gzipped {
        Body::from(gzip)
    } else {
        Body::from_stream(stream::iter(plain(gzip)))
    };
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
    headers.insert(header::VARY, HeaderValue::from_static("Accept-Encoding"));
    if is_gzipped {
        headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    response
}

/// Reads all VMs in scope, page by page, and the number of alerts.
async fn read(gateway: &Gateway, context: &Context) -> Result<Fleet, Fault> {
    let (fleet, alerts) = tokio::join!(read_vms(gateway, context), count_alerts(gateway, context));
    let mut fleet = fleet?;
    if alerts.is_none() {
        fleet.stale.insert(Source::Alerts);
    }
    fleet.alerts = alerts;
    Ok(fleet)
}

/// Reads the VMs. The deadline of the request limits the number of pages.
async fn read_vms(gateway: &Gateway, context: &Context) -> Result<Fleet, Fault> {
    let mut fleet = Fleet::default();
    let mut query = CurrentQuery::default();
    loop {
        let page = gateway.call::<VmsCurrent>(context, &query).await?;
        fleet.vms.extend(page.vms);
        fleet.stale.extend(page.stale.into_iter().filter_map(Source::of));
        if page.ranks.is_some() {
            let left_out = fleet.processes_left_out.get_or_insert(0);
            *left_out += page.processes_left_out;
        }
        if page.next.is_none() {
            return Ok(fleet);
        }
        query.after = page.next;
        query.ranks = page.ranks;
    }
}

/// Counts the alerts by severity; `None` if alert-svc does not answer in time.
async fn count_alerts(gateway: &Gateway, context: &Context) -> Option<BTreeMap<String, u64>> {
    let mut context = context.clone();
    let within_ms = u64::try_from(ALERTS_WITHIN.as_millis()).unwrap_or(u64::MAX);
    context.deadline_ms = context.deadline_ms.min(unix_millis() + within_ms);
    let filter = AlertFilter {
        limit: Limit::ONE,
        ..AlertFilter::default()
    };
    let page = gateway.call::<AlertsList>(&context, &filter).await;
    page.ok().map(|page| page.active)
}
