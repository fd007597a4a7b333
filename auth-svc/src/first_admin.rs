//! Creates the first administrator at the first start, so no deployment has a default password.

use mongodb::bson::DateTime;
use tracing::info;
use vmwatch_api::{Method, Role, Scope, users::UsersAdd};
use vmwatch_bus::audit::Audit;

use crate::{
    AuthError, audit,
    config::FirstAdmin,
    password::Hasher,
    store::{User, UserStore, not_before},
};

/// Creates the administrator if the database contains no users.
pub(crate) async fn ensure(
    users: &UserStore,
    hasher: &Hasher,
    settings: &FirstAdmin,
    audit: &Audit,
) -> Result<(), AuthError> {
    if users.is_empty().await? {
        make(users, hasher, settings, audit).await
    } else {
        Ok(())
    }
}

async fn make(
    users: &UserStore,
    hasher: &Hasher,
    settings: &FirstAdmin,
    audit: &Audit,
) -> Result<(), AuthError> {
    let generated = if settings.password.is_none() {
        Some(generate()?)
    } else {
        None
    };
    let Some(password) = settings
        .password
        .clone()
        .or_else(|| generated.as_deref()?.parse().ok())
    else {
        return Err(AuthError::Refused(
            "generating a password for the first administrator failed".to_owned(),
        ));
    };
    let password = password.into_inner();
    let user = User {
        key: settings.name.as_name().key(),
        name: settings.name.as_name().clone(),
        password_hash: hasher.hash(password).await?,
        role: Role::Admin,
        scope: Scope::All,
        service: false,
        created: DateTime::now(),
        sessions_not_before: not_before(None),
    };
    // If several replicas start at the same time, the database accepts the user of only one of them. Only that
    // replica's password is valid.
    let mut lost = false;
    let added = async {
        lost = !users.add(&user).await?;
        if lost {
            return Err(AuthError::Refused(
                "another replica created the first administrator".to_owned(),
            ));
        }
        Ok(())
    };
    let context = audit::own_context();
    let added = audit::announced(audit, &context, UsersAdd::INFO, user.name.as_str(), added).await;
    if lost {
        return Ok(());
    }
    added?;
    info!(user = %user.name, "created the first administrator");
    if let Some(password) = generated {
        // The password is printed to standard output and not logged, because logs are forwarded and stored.
        println!(
            "\nThe first administrator is `{}` with the password\n\n    {password}\n\n\
             It is shown this once. Change it with: vmwatch-auth user password {}\n",
            user.name, user.name
        );
    }
    Ok(())
}

/// Returns 96 random bits in hex.
fn generate() -> Result<String, AuthError> {
    let mut bits = [0_u8; 12];
    getrandom::fill(&mut bits).map_err(AuthError::Random)?;
    Ok(hex::encode(bits))
}

#[cfg(test)]
mod tests {
    use vmwatch_api::users::NewPassword;

    use super::*;

    #[test]
    fn generated_admin_passwords_are_valid_and_distinct() {
        let (one, other) = (generate().unwrap(), generate().unwrap());
        assert!(one.parse::<NewPassword>().is_ok() && one.len() == 24 && one != other);
    }
}
