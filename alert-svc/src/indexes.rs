//! The indexes of the collections.

use mongodb::{
    IndexModel,
    bson::{Document, doc},
    options::IndexOptions,
};

use crate::{AlertError, store::Store};

fn index(name: &str, keys: Document) -> IndexModel {
    let options = IndexOptions::builder().name(name.to_owned()).build();
    IndexModel::builder().keys(keys).options(options).build()
}

/// An index without entries for documents that lack the field.
fn sparse(name: &str, keys: Document) -> IndexModel {
    let options = IndexOptions::builder().name(name.to_owned()).sparse(true).build();
    IndexModel::builder().keys(keys).options(options).build()
}

/// Creates the indexes that are missing.
pub(crate) async fn prepare(store: &Store) -> Result<(), AlertError> {
    let alerts = [
        index("open", doc! { "open": 1, "alert.since_ms": -1, "_id": 1 }),
        index("unnotified", doc! { "unnotified": 1 }),
        index("state", doc! { "alert.state": 1, "alert.since_ms": -1, "_id": 1 }),
        index(
            "vm",
            doc! { "alert.instance_id": 1, "alert.since_ms": -1, "_id": 1 },
        ),
        index(
            "rule",
            doc! { "alert.rule_id": 1, "alert.since_ms": -1, "_id": 1 },
        ),
        sparse("resolved", doc! { "alert.resolved_ms": 1 }),
    ];
    let messages = [
        index(
            "channel",
            doc! { "message.channel_id": 1, "message.created_ms": -1, "_id": 1 },
        ),
        index("created", doc! { "message.created_ms": -1, "_id": 1 }),
        index(
            "alert",
            doc! { "message.alerts.id": 1, "message.created_ms": -1, "_id": 1 },
        ),
        sparse("due", doc! { "due_ms": 1 }),
        sparse("delivered", doc! { "message.delivered_ms": 1 }),
        sparse(
            "channel_delivered",
            doc! { "message.channel_id": 1, "message.delivered_ms": -1 },
        ),
    ];
    store.alerts.create_indexes(alerts).await?;
    store.messages.create_indexes(messages).await?;
    let until = index("until", doc! { "until_ms": 1 });
    store.silences.create_index(until).await?;
    Ok(())
}
