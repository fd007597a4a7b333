//! The principal: the authenticated user of a request. The gateway derives it from the session, and services enforce
//! its role and scope.

use std::{fmt, str::FromStr};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{IgnoredAny, MapAccess, Visitor},
};

use super::InstanceId;

/// The role of a user; each role includes the permissions of the previous one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// A viewer may read data.
    Viewer = 1,
    /// An operator may also perform actions on VMs.
    Operator = 2,
    /// An administrator may also manage users and read the audit.
    Admin = 3,
    /// A role that only a newer version of vmwatch knows. It ranks below all other roles and grants no permission. A
    /// request that contains it is rejected.
    #[serde(other)]
    Unknown = 0,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unknown => "unknown",
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

/// The set of VMs that a user may see.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// The scope contains every VM.
    All,
    /// The scope contains only these VMs.
    Only(Vec<InstanceId>),
    /// A scope that only a newer version of vmwatch knows. This version treats it as empty. A
    /// request that contains it is rejected.
    Unknown,
}

impl Scope {
    /// Whether the VM is within the scope.
    pub fn allows(&self, instance: &InstanceId) -> bool {
        match self {
            Self::All => true,
            Self::Only(instances) => instances.contains(instance),
            Self::Unknown => false,
        }
    }

    /// The VMs that are in both scopes. An unknown scope is treated as empty.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        match (self, other) {
            (Self::Unknown, _) | (_, Self::Unknown) => Self::Unknown,
            (Self::All, scope) | (scope, Self::All) => scope.clone(),
            (Self::Only(instances), other) => {
                let both = instances.iter().filter(|instance| other.allows(instance));
                Self::Only(both.cloned().collect())
            }
        }
    }
}

impl<'de> Deserialize<'de> for Scope {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ScopeVisitor)
    }
}

struct ScopeVisitor;

impl<'de> Visitor<'de> for ScopeVisitor {
    type Value = Scope;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("all or only")
    }

    fn visit_str<E>(self, text: &str) -> Result<Scope, E> {
        Ok(if text == "all" { Scope::All } else { Scope::Unknown })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Scope, A::Error> {
        let mut scope = Scope::Unknown;
        let mut keys = 0;
        while let Some(key) = map.next_key::<String>()? {
            keys += 1;
            if key == "only" {
                scope = Scope::Only(map.next_value()?);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        // With an additional field the scope is unknown, because a newer version may use that field to restrict the
        // scope.
        Ok(if keys == 1 { scope } else { Scope::Unknown })
    }
}

/// Implemented by hand because the derived schema would also list `Unknown`, which no API client can send.
#[cfg(feature = "openapi")]
impl utoipa::PartialSchema for Role {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        let description = "The role of a user; each role includes the permissions of the previous one.";
        super::known_values(description, ["viewer", "operator", "admin"])
    }
}

#[cfg(feature = "openapi")]
impl utoipa::ToSchema for Role {}

/// The schema of a scope that lists at most this many VMs. The derived schema would allow additional keys.
#[cfg(feature = "openapi")]
pub fn scope_schema(max_instances: usize) -> utoipa::openapi::schema::OneOfBuilder {
    use utoipa::openapi::{
        ArrayBuilder, ObjectBuilder, OneOfBuilder, Ref, Type, schema::AdditionalProperties,
    };
    let all = ObjectBuilder::new()
        .schema_type(Type::String)
        .description(Some("Every VM."))
        .enum_values(Some(["all"]));
    let instances = ArrayBuilder::new()
        .items(Ref::from_schema_name("InstanceId"))
        .max_items(Some(max_instances));
    let only = ObjectBuilder::new()
        .description(Some("Only these VMs."))
        .property("only", instances)
        .required("only")
        .additional_properties(Some(AdditionalProperties::FreeForm(false)));
    OneOfBuilder::new().item(all).item(only)
}

#[cfg(feature = "openapi")]
impl utoipa::PartialSchema for Scope {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        scope_schema(super::users::MOST_INSTANCES)
            .description(Some("The set of VMs that a user may see."))
            .into()
    }
}

#[cfg(feature = "openapi")]
impl utoipa::ToSchema for Scope {
    fn schemas(schemas: &mut Vec<(String, utoipa::openapi::RefOr<utoipa::openapi::Schema>)>) {
        let instance = <InstanceId as utoipa::PartialSchema>::schema();
        schemas.push((<InstanceId as utoipa::ToSchema>::name().into_owned(), instance));
    }
}

/// The authenticated user of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Principal {
    /// Name of the user.
    pub user: String,
    pub role: Role,
    /// The VMs that the user may see.
    pub scope: Scope,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_role_includes_the_permissions_of_lower_roles() {
        assert!(Role::Viewer < Role::Operator && Role::Operator < Role::Admin);
        for role in [Role::Viewer, Role::Operator, Role::Admin] {
            assert_eq!(role.to_string().parse::<Role>(), Ok(role));
        }
    }

    #[test]
    fn role_or_scope_of_newer_version_grants_nothing() {
        let newer = r#"{"user":"ann","role":"auditor","scope":{"tenant":"x"},"since":7}"#;
        let principal: Principal = serde_json::from_str(newer).unwrap();
        assert!(principal.role < Role::Viewer);
        assert!(!principal.scope.allows(&"vm-1".parse().unwrap()));
        for scope in [r#""mine""#, r#"{"only":["vm-1"],"except":["vm-1"]}"#, "{}"] {
            assert_eq!(
                serde_json::from_str::<Scope>(scope).unwrap(),
                Scope::Unknown,
                "{scope}"
            );
        }
        assert_eq!(serde_json::from_str::<Scope>(r#""all""#).unwrap(), Scope::All);
        assert!(serde_json::from_str::<Scope>(r#"{"only":["a b"]}"#).is_err());
    }

    #[test]
    fn limited_scope_allows_only_listed_vms() {
        let (one, other) = ("vm-1".parse().unwrap(), "vm-2".parse().unwrap());
        let scope = Scope::Only(vec![one]);
        assert!(scope.allows(&"vm-1".parse().unwrap()) && !scope.allows(&other));
        assert_eq!(serde_json::to_string(&scope).unwrap(), r#"{"only":["vm-1"]}"#);
    }
}
