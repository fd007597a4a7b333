//! OpenAPI schemas of the measures of a VM.

use utoipa::openapi::{KnownFormat, ObjectBuilder, OneOfBuilder, Ref, RefOr, Schema, SchemaFormat, Type};
use vmwatch_api::measures::{Measure, Unit, VM_MEASURES};

/// The schema of `VmValues`.
pub(super) fn values_schema() -> Schema {
    schema(|measure| {
        let value = ObjectBuilder::new().description(Some(measure.help));
        let value = match measure.unit {
            Unit::Count => value
                .schema_type(Type::Integer)
                .format(Some(SchemaFormat::KnownFormat(KnownFormat::Int32)))
                .minimum(Some(0)),
            Unit::Percent | Unit::KibPerSecond => value
                .schema_type(Type::Number)
                .format(Some(SchemaFormat::KnownFormat(KnownFormat::Double))),
        };
        value.into()
    })
}

/// The schema of the statistics of each measure, which are null without samples.
pub(super) fn stats_schema() -> Schema {
    schema(|measure| {
        let stat = Ref::builder()
            .ref_location_from_schema_name("Stat")
            .description(Some(measure.help));
        let null = ObjectBuilder::new().schema_type(Type::Null);
        OneOfBuilder::new().item(stat).item(null).into()
    })
}

/// The schema of an object with one required property per measure.
fn schema(property: impl Fn(Measure) -> RefOr<Schema>) -> Schema {
    let object = VM_MEASURES
        .into_array()
        .into_iter()
        .fold(ObjectBuilder::new(), |object, measure| {
            object
                .property(measure.name, property(measure))
                .required(measure.name)
        });
    object.into()
}
