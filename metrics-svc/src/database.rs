//! Helpers for database commands that all modules use.

use bson::{Document, doc};
use mongodb::{Collection, error::ErrorKind};
use tracing::Instrument;
use vmwatch_store::{WRITE_TIMEOUT, command_span};

use crate::MetricsError;

/// Maximum number of statements per database command, far below MongoDB's limits of 100,000 statements and 48 MB.
const MAX_STATEMENTS: usize = 1000;

/// MongoDB error code for a query that took longer than its `maxTimeMS`.
const TIME_LIMIT_EXCEEDED: i32 = 50;

/// Executes update statements in any order and waits until a majority of the database servers has acknowledged them.
/// The driver's `update_one` would cost a round trip per statement, and its `bulk_write` requires MongoDB 8.
pub(crate) async fn update<T: Send + Sync>(
    collection: &Collection<T>,
    statements: &[Document],
) -> Result<(), MetricsError> {
    let wtimeout = i64::try_from(WRITE_TIMEOUT.as_millis()).unwrap_or(i64::MAX);
    let database = collection.client().database(&collection.namespace().db);
    for chunk in statements.chunks(MAX_STATEMENTS) {
        let reply = database
            .run_command(doc! {
                "update": collection.name(),
                "updates": chunk,
                "ordered": false,
                "writeConcern": { "w": "majority", "j": true, "wtimeout": wtimeout },
            })
            .await?;
        // MongoDB reports success for the command as a whole even if some of its statements failed, so check each of
        // them.
        for failure in ["writeErrors", "writeConcernError"] {
            if let Some(error) = reply.get(failure) {
                return Err(MetricsError::Write(error.to_string()));
            }
        }
    }
    Ok(())
}

/// Sends a query and records it in a tracing span of its own.
pub(crate) async fn find<C: Send + Sync, T>(
    collection: &Collection<C>,
    query: impl IntoFuture<Output = mongodb::error::Result<T>>,
) -> Result<T, MetricsError> {
    let span = command_span("find", collection.name());
    let found = query.into_future().instrument(span).await;
    found.map_err(|error| match *error.kind {
        ErrorKind::Command(ref refusal) if refusal.code == TIME_LIMIT_EXCEEDED => {
            MetricsError::DeadlinePassed
        }
        _ => error.into(),
    })
}
