//! The handlers of the methods for API tokens.

use std::sync::Arc;

use vmwatch_api::{
    Method, Role, UserKey, UserName,
    api_tokens::{
        ApiTokenList, ApiTokenPage, ApiTokenRef, ApiTokensCreate, ApiTokensRevoke, CreatedApiToken,
        NewApiToken, UsedApiTokens,
    },
    enrollment::SecretText,
    users::Done,
};
use vmwatch_bus::Context;

use crate::{
    Auth, AuthError,
    api_tokens::{generate, record_for},
    audit, store,
};

impl Auth {
    pub(crate) async fn create_api_token(
        self: Arc<Self>,
        context: Context,
        new: NewApiToken,
    ) -> Result<CreatedApiToken, AuthError> {
        let token = generate()?;
        let owner = new.service_account.as_ref();
        let owner = owner.map_or_else(|| context.user().to_owned(), UserName::shown);
        let detail = format!("{} of {owner}, role {}", new.name, new.role);
        if !self.floods.api_tokens.admits(context.user()) {
            let error = AuthError::TooManyNewApiTokens;
            self.record_refusal(
                &context,
                ApiTokensCreate::INFO,
                None,
                format!("{detail}: {error}"),
            )
            .await;
            return Err(error);
        }
        let creating = async {
            let owner = self.owner_of(&context, new.service_account.as_ref()).await?;
            let record = record_for(&token, &new, &owner, context.user())?;
            let summary = self.api_tokens.create(token.id, &record).await?;
            Ok(CreatedApiToken {
                token: SecretText::new(&token),
                summary,
            })
        };
        let id = token.id.to_string();
        audit::announced_with(
            &self.audit,
            &context,
            ApiTokensCreate::INFO,
            (&id, &detail),
            creating,
        )
        .await
    }

    /// The owner of a new token: the caller, or a service account if the caller is an administrator.
    async fn owner_of(
        &self,
        context: &Context,
        service_account: Option<&UserName>,
    ) -> Result<store::User, AuthError> {
        let Some(name) = service_account else {
            let user = self.accounts.users.find(&caller(context)).await?;
            return user.ok_or(AuthError::NoSuchSession);
        };
        if !is_admin(context) {
            return Err(AuthError::TokensOfOthers);
        }
        let found = self.accounts.users.find(&name.key()).await?;
        let account = found.filter(|user| user.service);
        account.ok_or_else(|| AuthError::NoServiceAccount(name.clone()))
    }

    pub(crate) async fn list_api_tokens(
        self: Arc<Self>,
        context: Context,
        page: ApiTokenPage,
    ) -> Result<ApiTokenList, AuthError> {
        if page.all && !is_admin(&context) {
            return Err(AuthError::TokensOfOthers);
        }
        let owner = (!page.all).then(|| caller(&context));
        self.api_tokens.list(&page, owner.as_ref()).await
    }

    pub(crate) async fn revoke_api_token(
        self: Arc<Self>,
        context: Context,
        ApiTokenRef { id }: ApiTokenRef,
    ) -> Result<Done, AuthError> {
        let owner = (!is_admin(&context)).then(|| caller(&context));
        if let Some(owner) = &owner
            && !self.api_tokens.has(id, owner).await?
        {
            let error = AuthError::NoSuchApiToken;
            let target = id.to_string();
            self.record_refusal(&context, ApiTokensRevoke::INFO, Some(&target), error.to_string())
                .await;
            return Err(error);
        }
        let revoking = async { self.api_tokens.revoke(id, owner.as_ref()).await.map(|()| Done {}) };
        let target = id.to_string();
        audit::announced(&self.audit, &context, ApiTokensRevoke::INFO, &target, revoking).await
    }

    /// Records the latest uses of API tokens, as reported by a gateway.
    pub(crate) async fn note_token_uses(
        self: Arc<Self>,
        _: Context,
        used: UsedApiTokens,
    ) -> Result<Done, AuthError> {
        self.api_tokens.note_uses(used.tokens).await?;
        Ok(Done {})
    }
}

fn caller(context: &Context) -> UserKey {
    UserKey::from_name(context.user())
}

fn is_admin(context: &Context) -> bool {
    let principal = context.principal.as_ref();
    principal.is_some_and(|principal| principal.role == Role::Admin)
}
