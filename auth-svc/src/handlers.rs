//! The methods of auth-svc.

use shared::{
    api::auth::{Credentials, Session},
    bus::Context,
};
use tracing::info;

use crate::{Auth, AuthError};

impl Auth {
    /// Checks name and password, and makes a session. Unknown users cost the same work as known ones.
    pub(crate) async fn login(
        &self,
        context: &Context,
        credentials: Credentials,
    ) -> Result<Session, AuthError> {
        let Credentials { user_name, password } = credentials;
        let user = self.users.find(&user_name).await?;
        let stored = user.as_ref().map(|user| user.password_hash.clone());
        let right = self.hasher.verify(password, stored).await?;
        let source = context.source.as_deref().unwrap_or("-");
        let Some(user) = user.filter(|_| right) else {
            info!(user = %user_name, source, "login refused");
            return Err(AuthError::WrongCredentials);
        };
        let session = self.sessions.create(user.principal()).await?;
        info!(user = %user_name, source, "login");
        Ok(session)
    }
}
