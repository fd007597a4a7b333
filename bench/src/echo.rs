//! Runs a service that does no work, to measure the path through gateway and bus. It answers method 611611 with a row
//! from memory. It also answers requests to [`RAW_SUBJECT`] by returning their payload.

use futures::StreamExt;
use vmwatch_api::{
    Service,
    metrics::{RowPage, Rows, VmLatest},
};
use vmwatch_bus::{
    Bus, BusSettings,
    serve::{ServeSettings, Server},
};
use vmwatch_service::{config::Environment, lifetime::shutdown_on_signal};

/// The subject of bare NATS requests, which are answered without the bus layer `vmwatch-bus`.
pub(crate) const RAW_SUBJECT: &str = "bench.echo";

/// The fixed VM row that this substitute for metrics-svc returns for every read. It is the example of the API document.
pub(crate) const ROWS: &str = r#"[{"net_incoming":0.6,"disk_write":128.8,"mem":8.6,"net_outgoing":5.7,"instance_id":"6abf5a1e-b85c-4e5f-ba02-f96e22cbd02e","cpu_util":0.0,"disk_read":0.0,"create_date":"2017-01-01T21:37:59.001065","_id":"58690637594c10403e25b049","proc":95}]"#;

/// Serves requests until SIGTERM.
pub(crate) async fn serve() -> anyhow::Result<()> {
    let env = Environment::from_process();
    let invalid = |_| anyhow::anyhow!(env.problems().join("; "));
    let bus = Bus::connect("bench-echo", &BusSettings::read(&env).map_err(invalid)?).await?;
    let mut raw = bus
        .client_for_tests()
        .queue_subscribe(RAW_SUBJECT, "bench".to_owned())
        .await?;
    let client = bus.client_for_tests().clone();
    tokio::spawn(async move {
        while let Some(message) = raw.next().await {
            if let Some(reply) = message.reply {
                // Publishing fails only if the connection is closed permanently.
                let _ = client.publish(reply, message.payload).await;
            }
        }
    });
    let rows = RowPage::whole(Rows::from_json(ROWS.to_owned())?);
    let settings = ServeSettings::read(&env).map_err(invalid)?;
    Server::new(&bus, Service::Metrics, settings)
        .method(VmLatest, move |_, _| {
            let rows = rows.clone();
            async move { Ok(rows) }
        })
        .run(shutdown_on_signal()?, || ())
        .await?;
    Ok(())
}
