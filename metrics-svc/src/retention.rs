//! Retention of rows by a TTL index on their internal date. Rows of the software of 2017 have no internal date and are
//! kept.

use std::time::Duration;

use bson::{RawDocumentBuf, doc};
use futures::TryStreamExt;
use mongodb::{Collection, Database, IndexModel, error::ErrorKind, options::IndexOptions};
use tracing::info;

use crate::{MetricsError, documents::SAMPLED_AT};

const INDEX: &str = "retention";

/// Sets the retention of a collection: creates its TTL index, or changes the existing one in place.
pub(crate) async fn apply(
    database: &Database,
    rows: &Collection<RawDocumentBuf>,
    keep: Duration,
) -> Result<(), MetricsError> {
    let present = current(rows).await?;
    if present == Some(keep) {
        return Ok(());
    }
    if present.is_none() {
        let options = IndexOptions::builder()
            .name(INDEX.to_owned())
            .expire_after(keep)
            .build();
        rows.create_index(
            IndexModel::builder()
                .keys(doc! { SAMPLED_AT: 1 })
                .options(options)
                .build(),
        )
        .await?;
    } else {
        let seconds = i64::try_from(keep.as_secs()).unwrap_or(i64::MAX);
        let index = doc! { "name": INDEX, "expireAfterSeconds": seconds };
        database
            .run_command(doc! { "collMod": rows.name(), "index": index })
            .await?;
    }
    info!(
        collection = rows.name(),
        days = keep.as_secs() / 86_400,
        "retention of a collection changed"
    );
    Ok(())
}

/// Reads the retention of a collection that is currently set in the database.
async fn current(rows: &Collection<RawDocumentBuf>) -> Result<Option<Duration>, MetricsError> {
    let indexes: Vec<IndexModel> = match rows.list_indexes().await {
        Ok(indexes) => indexes.try_collect().await?,
        // A missing collection is not an error, because the first write to a collection creates it.
        Err(error) if is_missing(&error) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let options = indexes.into_iter().filter_map(|index| index.options);
    Ok(options
        .filter(|options| options.name.as_deref() == Some(INDEX))
        .find_map(|options| options.expire_after))
}

/// Whether the error is MongoDB's `NamespaceNotFound`.
fn is_missing(error: &mongodb::error::Error) -> bool {
    matches!(*error.kind, ErrorKind::Command(ref refusal) if refusal.code == 26)
}
