//! `vmwatch login` and `vmwatch logout`.

use std::{
    env,
    path::{self, PathBuf},
};

use serde_json::json;

use crate::{
    answers::Session,
    args::Login,
    client::Client,
    config::{ConfigFile, Context},
    connection::{Choices, Connection, find_context, parse_url},
    error::CliError,
    output::{Output, note},
    secret::{InvalidToken, ask_password, password_from_file},
    url::GatewayUrl,
};

/// Signs in and stores the session in a context, which is the current one from then on.
pub(crate) async fn login(args: &Login, choices: &Choices, output: &Output) -> Result<(), CliError> {
    let mut file = ConfigFile::load()?;
    let (name, url, ca_file) = target(args, choices, &file)?;
    let user = match &args.user {
        Some(user) => user.clone(),
        None => env::var("USER")
            .map_err(|_| CliError::Usage("give the name of the user with --user".to_owned()))?,
    };
    let password = match &args.password_file {
        Some(path) => password_from_file(path)?,
        None => ask_password(&format!("Password of {user} at {url}: "))?,
    };
    let client = Client::new(Connection {
        url: url.clone(),
        ca_file: ca_file.clone(),
        token: None,
    })?;
    let body = json!({ "user_name": user, "password": password });
    let session: Session = client.post("/sessions", &body).await?;
    let token = session.token.parse();
    let context = Context {
        url,
        ca_file,
        token_file: None,
        token: Some(token.map_err(|error: InvalidToken| CliError::Answer(error.to_string()))?),
    };
    file.config.contexts.insert(name.clone(), context);
    file.config.current = Some(name.clone());
    file.save()?;
    let until = output.time(session.expires_at);
    note(&format!(
        "signed in as {} ({}) until {until}; context {name}",
        session.user_name, session.role
    ));
    Ok(())
}

/// The name, address and certificate authorities of the context that is signed in to.
fn target(
    args: &Login,
    choices: &Choices,
    file: &ConfigFile,
) -> Result<(String, GatewayUrl, Option<PathBuf>), CliError> {
    let given = args.gateway.as_ref().or(choices.url.as_ref());
    let Some(given) = given else {
        let (name, context) = find_context(&file.config, choices.context.as_deref())?;
        let ca_file = choices.ca_file.clone().or_else(|| context.ca_file.clone());
        return Ok((name.to_owned(), context.url.clone(), ca_file));
    };
    let url = parse_url(given)?;
    let name = choices.context.clone().unwrap_or_else(|| url.host().to_owned());
    // A relative path would depend on the folder in which a command runs.
    let absolute = choices.ca_file.as_deref().map(path::absolute).transpose();
    let absolute = absolute.map_err(|error| CliError::Usage(format!("--ca-file: {error}")))?;
    Ok((name, url, absolute))
}

/// Ends the session of the context.
pub(crate) async fn logout(choices: &Choices) -> Result<(), CliError> {
    let mut file = ConfigFile::load()?;
    let (name, context) = find_context(&file.config, choices.context.as_deref())?;
    let (name, context) = (name.to_owned(), context.clone());
    let Some(token) = context.token else {
        return Err(CliError::Usage(format!("the context {name} has no session")));
    };
    let client = Client::new(Connection {
        url: context.url,
        ca_file: context.ca_file,
        token: Some(token),
    })?;
    match client.delete("/sessions/current").await {
        // With 401 the session had ended before.
        Ok(()) | Err(CliError::Problem { status: 401, .. }) => {}
        Err(error) => return Err(error),
    }
    if let Some(context) = file.config.contexts.get_mut(&name) {
        context.token = None;
    }
    file.save()?;
    note(&format!("signed out; context {name}"));
    Ok(())
}
