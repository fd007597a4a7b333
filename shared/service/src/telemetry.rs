//! Logs, traces and metrics, which each program sets up once at its start.

use std::time::Duration;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::{Protocol, WithExportConfig};
use opentelemetry_sdk::{Resource, propagation::TraceContextPropagator, trace::SdkTracerProvider};
use tracing_subscriber::{
    EnvFilter, Layer,
    filter::{FilterExt, LevelFilter, filter_fn},
    fmt::{FormatFields, format::debug_fn},
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

use crate::config::{Environment, Invalid, LOG, LOG_FORMAT, OTLP_ENDPOINT, Setting};

/// The target of trace spans that do not appear in the log. They cost nothing while no traces are sent.
pub const TRACES_ONLY: &str = "vmwatch_traces";

/// The telemetry settings of every program.
pub const SETTINGS: &[Setting] = &[LOG, LOG_FORMAT, OTLP_ENDPOINT];

/// The telemetry configuration: log filter, log format, and the collector of traces.
#[derive(Debug, Clone)]
pub struct TelemetrySettings {
    filter: String,
    json: bool,
    otlp_endpoint: Option<String>,
}

impl TelemetrySettings {
    pub fn read(env: &Environment) -> Result<Self, Invalid> {
        let filter = env.get::<String>(&LOG);
        let format = env.get::<String>(&LOG_FORMAT);
        let otlp_endpoint = env.optional(&OTLP_ENDPOINT);
        let filter = filter?;
        if let Err(error) = EnvFilter::try_new(&filter) {
            return Err(env.problem(format!("{}: `{filter}` is invalid: {error}", LOG.name)));
        }
        let json = match format?.as_str() {
            "text" => false,
            "json" => true,
            _ => return Err(env.problem(format!("{}: write text or json", LOG_FORMAT.name))),
        };
        Ok(Self {
            filter,
            json,
            otlp_endpoint: otlp_endpoint?,
        })
    }
}

#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("the collector of traces in {} cannot be used", OTLP_ENDPOINT.name)]
    Exporter(#[from] opentelemetry_otlp::ExporterBuildError),
    #[error("telemetry is already set up")]
    Twice,
}

/// Keeps telemetry running; [`Telemetry::finish`] sends the buffered trace spans.
#[must_use = "call `finish`, or buffered spans are lost"]
pub struct Telemetry {
    traces: Option<SdkTracerProvider>,
    metrics: PrometheusHandle,
}

impl Telemetry {
    /// Starts logs on standard error and metrics, and starts traces if a collector is configured.
    pub fn start(program: &'static str, settings: &TelemetrySettings) -> Result<Self, TelemetryError> {
        opentelemetry::global::set_text_map_propagator(TraceContextPropagator::new());
        let traces = match &settings.otlp_endpoint {
            Some(endpoint) => Some(tracer_provider(program, endpoint)?),
            None => None,
        };
        let otel_layer = traces.as_ref().map(|provider| {
            opentelemetry::global::set_tracer_provider(provider.clone());
            tracing_opentelemetry::layer()
                .with_tracer(provider.tracer("vmwatch"))
                .with_filter(LevelFilter::INFO)
        });
        // The default is never used, because the filter was validated when the settings were read.
        let filter = EnvFilter::try_new(&settings.filter).unwrap_or_default();
        let filter = filter.and(filter_fn(|metadata| metadata.target() != TRACES_ONLY));
        let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
        let log = if settings.json {
            log.json().flatten_event(true).boxed()
        } else {
            log.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
                .fmt_fields(readable_fields())
                .boxed()
        };
        tracing_subscriber::registry()
            .with(log.with_filter(filter))
            .with(otel_layer)
            .try_init()
            .map_err(|_| TelemetryError::Twice)?;
        let metrics = metrics_recorder()?;
        keep_small(metrics.clone());
        Ok(Self { traces, metrics })
    }

    /// The handle that renders the metrics for `/metrics`.
    pub fn metrics(&self) -> PrometheusHandle {
        self.metrics.clone()
    }

    /// Sends the buffered trace spans.
    pub fn finish(self) {
        if let Some(Err(error)) = self.traces.map(|provider| provider.shutdown()) {
            tracing::warn!(%error, "failed to send the remaining traces at shutdown");
        }
    }
}

/// Formats log fields for people. Fields with a dot in the name (`otel.kind`, `db.system.name`) are meant for traces
/// and are omitted.
fn readable_fields() -> impl for<'writer> FormatFields<'writer> {
    debug_fn(|writer, field, value| match field.name() {
        "message" => write!(writer, "{value:?} "),
        name if name.contains('.') => Ok(()),
        name => write!(writer, "{name}={value:?} "),
    })
}

fn tracer_provider(program: &'static str, endpoint: &str) -> Result<SdkTracerProvider, TelemetryError> {
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_http()
        .with_protocol(Protocol::HttpBinary)
        .with_endpoint(format!("{}/v1/traces", endpoint.trim_end_matches('/')))
        .build()?;
    let resource = Resource::builder().with_service_name(program).build();
    Ok(SdkTracerProvider::builder()
        .with_resource(resource)
        .with_batch_exporter(exporter)
        .build())
}

/// Starts a thread that regularly maintains the metrics. A histogram keeps every recorded value until it is rendered or
/// maintained; without maintenance, the memory of a program that is not scraped would grow with each request. The
/// maintenance runs in a thread and not in an async task, because not every program has an async runtime at this point.
fn keep_small(metrics: PrometheusHandle) {
    const EVERY: Duration = Duration::from_secs(5);
    let tidying = move || {
        loop {
            std::thread::sleep(EVERY);
            metrics.run_upkeep();
        }
    };
    let started = std::thread::Builder::new()
        .name("metrics".to_owned())
        .spawn(tidying);
    if let Err(error) = started {
        tracing::warn!(%error, "metrics maintenance thread did not start; memory grows until metrics are scraped");
    }
}

fn metrics_recorder() -> Result<PrometheusHandle, TelemetryError> {
    // Histogram boundaries in seconds, from a cached read (0.2 ms) to the start of a VM (30 s).
    const SECONDS: [f64; 12] = [
        0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0,
    ];
    PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)
        .and_then(PrometheusBuilder::install_recorder)
        .map_err(|_| TelemetryError::Twice)
}
