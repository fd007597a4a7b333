//! Decodes stored VM rows.

use bson::{RawBsonRef, RawDocument, oid::ObjectId};
use vmwatch_api::{measures::VmMeasures, metrics::Restriction};

use crate::MetricsError;

/// The fields of a VM row that rollups and charts use.
#[derive(Debug, Clone, Copy)]
pub(crate) struct VmRow<'a> {
    /// Id of the row, if it is an `ObjectId`.
    pub(crate) id: Option<ObjectId>,
    /// Time of the sample, as stored.
    pub(crate) create_date: &'a str,
    /// Values of the row; `None` for a missing or non-finite number.
    pub(crate) values: VmMeasures<Option<f64>>,
    /// Why the agent could not see all processes; `None` if it could.
    pub(crate) restricted: Option<Restriction>,
}

/// Field of a VM row with the name of a restriction; most rows do not have it.
pub(crate) const RESTRICTED: &str = "restricted";

impl<'a> VmRow<'a> {
    /// Decodes a stored row, or a projection of a stored row.
    pub(crate) fn from_document(row: &'a RawDocument) -> Result<Self, MetricsError> {
        let mut read = Self {
            id: None,
            create_date: "",
            values: VmMeasures::default(),
            restricted: None,
        };
        for element in row {
            let (key, value) = element?;
            match (key.as_str(), value) {
                ("_id", RawBsonRef::ObjectId(id)) => read.id = Some(id),
                ("create_date", RawBsonRef::String(text)) => read.create_date = text,
                (RESTRICTED, RawBsonRef::String(name)) => read.restricted = Restriction::from_name(name),
                (key, value) => {
                    if let Some(slot) = read.values.get_mut(key) {
                        *slot = number(value);
                    }
                }
            }
        }
        Ok(read)
    }
}

/// Returns the stored number if it is finite.
pub(crate) fn number(value: RawBsonRef<'_>) -> Option<f64> {
    let number = match value {
        RawBsonRef::Double(number) => number,
        RawBsonRef::Int32(number) => f64::from(number),
        #[expect(clippy::cast_precision_loss, reason = "a chart needs no more than 53 bits")]
        RawBsonRef::Int64(number) => number as f64,
        _ => return None,
    };
    number.is_finite().then_some(number)
}
