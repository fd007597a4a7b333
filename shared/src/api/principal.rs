//! Who asks: the user behind a request, as the gateway found it in the session and services enforce it.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::InstanceId;

/// What a user may do; each role may do all that the one before may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
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
