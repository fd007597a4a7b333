//! Commands to the database, as all of its users here send them.

use bson::{Document, doc};
use mongodb::Collection;
use tracing::Instrument;
use vmwatch_store::{WRITE_TIMEOUT, command_span};

use crate::MetricsError;

/// The statements of one command: far below the 100,000 and the 48 MB that a command may have.
const STATEMENTS: usize = 1000;

/// Carries out update statements, in any order, each acknowledged by a majority. The driver's `update_one` costs a
/// round trip each, and its `bulk_write` needs MongoDB 8.
pub(crate) async fn update<T: Send + Sync>(
    collection: &Collection<T>,
    statements: &[Document],
) -> Result<(), MetricsError> {
    let wtimeout = i64::try_from(WRITE_TIMEOUT.as_millis()).unwrap_or(i64::MAX);
    let database = collection.client().database(&collection.namespace().db);
    for some in statements.chunks(STATEMENTS) {
        let reply = database
            .run_command(doc! {
                "update": collection.name(),
                "updates": some,
                "ordered": false,
                "writeConcern": { "w": "majority", "j": true, "wtimeout": wtimeout },
            })
            .await?;
        // A command of many parts is answered well although parts failed.
        for failure in ["writeErrors", "writeConcernError"] {
            if let Some(error) = reply.get(failure) {
                return Err(MetricsError::Write(error.to_string()));
            }
        }
    }
    Ok(())
}

/// Sends a query, in a span of its own.
pub(crate) async fn find<C: Send + Sync, T>(
    collection: &Collection<C>,
    query: impl IntoFuture<Output = mongodb::error::Result<T>>,
) -> Result<T, MetricsError> {
    let span = command_span("find", collection.name());
    Ok(query.into_future().instrument(span).await?)
}
