//! A service that costs nothing: it answers 611611 with a row from memory, and a bare subject with what it was sent.
//! What is left of a request is the way through gateway and bus.

use futures::StreamExt;
use shared::{
    api::{
        Service,
        metrics::{RowPage, Rows, VmLatest},
    },
    bus::{
        Bus, BusSettings,
        serve::{ServeSettings, Server},
    },
    config::Environment,
    lifetime::shutdown_on_signal,
};

/// The subject without any of our layers.
pub(crate) const RAW_SUBJECT: &str = "bench.echo";

/// The row that is answered; the document's own.
pub(crate) const ROWS: &str = r#"[{"net_incoming":0.6,"disk_write":128.8,"mem":8.6,"net_outgoing":5.7,"instance_id":"6abf5a1e-b85c-4e5f-ba02-f96e22cbd02e","cpu_util":0.0,"disk_read":0.0,"create_date":"2017-01-01T21:37:59.001065","_id":"58690637594c10403e25b049","proc":95}]"#;

/// Serves until SIGTERM.
pub(crate) async fn serve() -> anyhow::Result<()> {
    let env = Environment::of_process();
    let wrong = |_| anyhow::anyhow!(env.problems().join("; "));
    let bus = Bus::connect("bench-echo", &BusSettings::read(&env).map_err(wrong)?).await?;
    let mut raw = bus
        .client()
        .queue_subscribe(RAW_SUBJECT, "bench".to_owned())
        .await?;
    let client = bus.client().clone();
    tokio::spawn(async move {
        while let Some(message) = raw.next().await {
            if let Some(reply) = message.reply {
                // Fails only where the connection is closed for good.
                let _ = client.publish(reply, message.payload).await;
            }
        }
    });
    let rows = RowPage::whole(Rows::from_json(ROWS.to_owned())?);
    let settings = ServeSettings::read(&env).map_err(wrong)?;
    Server::new(&bus, Service::Metrics, settings)
        .method::<VmLatest, _, _>(move |_, _| {
            let rows = rows.clone();
            async move { Ok(rows) }
        })
        .run(shutdown_on_signal()?)
        .await?;
    Ok(())
}
