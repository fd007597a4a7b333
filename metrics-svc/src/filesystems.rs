//! The filesystems of a VM at a moment.

use bson::{RawBsonRef, RawDocument};
use vmwatch_api::{
    filesystems::{Filesystems, FilesystemsAtQuery},
    metrics::{FilesystemSample, SAMPLE_FILESYSTEMS},
    time::unix_millis,
};

use crate::{
    MetricsError,
    deadline::Deadline,
    reads::{Budget, Most, Newest, Order, Query, micros},
    store::{RowKind, RowStore},
};

/// The fields of a filesystem's row.
const COLUMNS: [&str; 4] = ["mount_point", "filesystem", "used_bytes", "total_bytes"];

impl RowStore {
    /// Returns the filesystems of the newest sample at or before the moment.
    pub(crate) async fn filesystems(
        &self,
        query: &FilesystemsAtQuery,
        deadline: Deadline,
    ) -> Result<Filesystems, MetricsError> {
        let instance = &query.instance_id;
        // A sample within the requested millisecond also counts as "at the moment".
        let end = micros(query.at_ms.unwrap_or_else(unix_millis)).saturating_add(1000);
        let newest = self.sample_before(RowKind::Filesystem, instance, end, deadline);
        let Some(sample) = newest.await? else {
            return Ok(Filesystems::default());
        };
        // All filesystems of a sample are in one part of it, so they have the same effective date.
        let mut rows = Query::new(RowKind::Filesystem, instance, &COLUMNS);
        rows.time = sample.effective..sample.effective.saturating_add(1);
        let most = Most {
            rows: SAMPLE_FILESYSTEMS,
            after: None,
        };
        let mut found = Newest::new(most, Order::Newest);
        let mut budget = Budget::of_request(self);
        found.read(self, &rows, &mut budget, deadline).await?;
        let of_sample = found
            .into_rows()
            .into_iter()
            .filter(|row| row.create_date == sample.create_date);
        let filesystems: Result<Vec<_>, _> = of_sample.map(|row| read(&row.document)).collect();
        let mut filesystems = filesystems?;
        filesystems.sort_by(|one, other| one.mount_point.cmp(&other.mount_point));
        Ok(Filesystems {
            at_ms: Some(sample.at_ms()),
            filesystems,
        })
    }
}

/// Decodes a stored row. A missing size becomes 0, and a missing text empty; ingested rows have all of them.
fn read(row: &RawDocument) -> Result<FilesystemSample, MetricsError> {
    let text = |key| {
        Ok::<_, MetricsError>(
            row.get(key)?
                .and_then(RawBsonRef::as_str)
                .unwrap_or_default()
                .to_owned(),
        )
    };
    let bytes = |key| {
        let bytes = row.get(key)?.and_then(RawBsonRef::as_i64).unwrap_or(0);
        Ok::<_, MetricsError>(u64::try_from(bytes).unwrap_or(0))
    };
    Ok(FilesystemSample {
        mount_point: text("mount_point")?,
        filesystem: text("filesystem")?,
        used_bytes: bytes("used_bytes")?,
        total_bytes: bytes("total_bytes")?,
    })
}
