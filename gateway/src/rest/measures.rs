//! OpenAPI schemas that list the measures of a VM (CPU, memory, disk and network values).

use utoipa::openapi::{
    KnownFormat, ObjectBuilder, OneOfBuilder, Ref, RefOr, Schema, SchemaFormat, Type, schema::SchemaType,
};
use vmwatch_api::measures::{Measure, Unit, VM_MEASURES};

/// Schema of `VmValues`: one value per measure, or null where it is unknown.
pub(super) fn values_schema() -> Schema {
    schema(|measure| {
        let value = ObjectBuilder::new().description(Some(measure.help));
        let value = match measure.unit {
            Unit::Count => value
                .schema_type(nullable(Type::Integer))
                .format(Some(SchemaFormat::KnownFormat(KnownFormat::Int32)))
                .minimum(Some(0)),
            Unit::Percent | Unit::KibPerSecond | Unit::Load => value
                .schema_type(nullable(Type::Number))
                .format(Some(SchemaFormat::KnownFormat(KnownFormat::Double))),
        };
        value.into()
    })
}

fn nullable(of: Type) -> SchemaType {
    SchemaType::from_iter([of, Type::Null])
}

/// Schema of the minimum, average and maximum of each measure, which are null if there are no samples.
pub(super) fn stats_schema() -> Schema {
    schema(|measure| {
        let stat = Ref::builder()
            .ref_location_from_schema_name("Stat")
            .description(Some(measure.help));
        let null = ObjectBuilder::new().schema_type(Type::Null);
        OneOfBuilder::new().item(stat).item(null).into()
    })
}

/// Schema of an object that has one required property per measure.
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
