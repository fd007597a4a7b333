//! Who asks: the user behind a request, as the gateway found it in the session and services enforce it.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::InstanceId;

/// What a user may do; each role may do all that the one before may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum Role {
    /// Reads.
    Viewer,
    /// Also starts and stops VMs.
    Operator,
    /// Also manages users.
    Admin,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        })
    }
}

impl FromStr for Role {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "viewer" => Ok(Self::Viewer),
            "operator" => Ok(Self::Operator),
            "admin" => Ok(Self::Admin),
            _ => Err("must be viewer, operator or admin"),
        }
    }
}

/// Which instances a user may see.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Every instance.
    All,
    /// These only.
    Only(Vec<InstanceId>),
}

impl Scope {
    /// Whether the instance is within the scope.
    pub fn allows(&self, instance: &InstanceId) -> bool {
        match self {
            Self::All => true,
            Self::Only(instances) => instances.contains(instance),
        }
    }
}

/// By hand, since a derived schema would allow more keys than the one.
#[cfg(feature = "openapi")]
impl utoipa::PartialSchema for Scope {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        use utoipa::openapi::{
            ArrayBuilder, ObjectBuilder, OneOfBuilder, Ref, Type, schema::AdditionalProperties,
        };
        let all = ObjectBuilder::new()
            .schema_type(Type::String)
            .description(Some("Every instance."))
            .enum_values(Some(["all"]));
        let instances = ArrayBuilder::new()
            .items(Ref::from_schema_name("InstanceId"))
            .max_items(Some(super::users::MOST_INSTANCES));
        let only = ObjectBuilder::new()
            .description(Some("These only."))
            .property("only", instances)
            .required("only")
            .additional_properties(Some(AdditionalProperties::FreeForm(false)));
        let either = OneOfBuilder::new().item(all).item(only);
        either.description(Some("Which instances a user may see.")).into()
    }
}

#[cfg(feature = "openapi")]
impl utoipa::ToSchema for Scope {
    fn schemas(schemas: &mut Vec<(String, utoipa::openapi::RefOr<utoipa::openapi::Schema>)>) {
        let instance = <InstanceId as utoipa::PartialSchema>::schema();
        schemas.push((<InstanceId as utoipa::ToSchema>::name().into_owned(), instance));
    }
}

/// The user behind a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Principal {
    /// The user's name.
    pub user: String,
    /// What the user may do.
    pub role: Role,
    /// Which instances the user may see.
    pub scope: Scope,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_role_may_what_the_one_before_may() {
        assert!(Role::Viewer < Role::Operator && Role::Operator < Role::Admin);
        for role in [Role::Viewer, Role::Operator, Role::Admin] {
            assert_eq!(role.to_string().parse::<Role>(), Ok(role));
        }
    }

    #[test]
    fn a_limited_scope_allows_its_own_instances_only() {
        let (one, other) = ("vm-1".parse().unwrap(), "vm-2".parse().unwrap());
        let scope = Scope::Only(vec![one]);
        assert!(scope.allows(&"vm-1".parse().unwrap()) && !scope.allows(&other));
        assert_eq!(serde_json::to_string(&scope).unwrap(), r#"{"only":["vm-1"]}"#);
    }
}
