//! The methods of auth-svc.

use shared::{
    api::auth::{Credentials, Session},
    bus::Context,
};
use tracing::info;

use crate::{Auth, AuthError, throttle::Attempt};

impl Auth {
    /// Checks name and password, and makes a session. Unknown users cost the same work as known ones.
    pub(crate) async fn login(
        &self,
        context: &Context,
        credentials: Credentials,
    ) -> Result<Session, AuthError> {
        let Credentials { user_name, password } = credentials;
        let source = context.source.as_deref().unwrap_or("-");
        let attempt = Attempt::new(&user_name, source);
        let permit = self.hasher.permit().await?;
        let (user, ()) = tokio::try_join!(self.users.find(&user_name), self.throttle.admit(&attempt))?;
        let stored = user.as_ref().map(|user| user.password_hash.clone());
        let (right, permit) = self.hasher.verify(permit, password, stored).await?;
        let Some(user) = user.filter(|_| right) else {
            self.throttle.count_failure(&attempt).await?;
            drop(permit);
            info!(user = %user_name, source, "login refused");
            return Err(AuthError::WrongCredentials);
        };
        drop(permit);
        let (session, ()) = tokio::join!(
            self.sessions.create(user.principal()),
            self.throttle.forget(&attempt)
        );
        let session = session?;
        info!(user = %user_name, source, "login");
        Ok(session)
    }
}
