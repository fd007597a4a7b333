//! Which gateway a command uses, and with which token.

use std::{env, path::PathBuf};

use crate::{
    args::Global,
    config::{Config, ConfigFile, Context},
    error::CliError,
    secret::Token,
    url::GatewayUrl,
};

/// The address of a gateway, and how to authenticate to it.
#[derive(Debug, Clone)]
pub(crate) struct Connection {
    pub(crate) url: GatewayUrl,
    pub(crate) ca_file: Option<PathBuf>,
    pub(crate) token: Option<Token>,
}

/// Choices of the command line and of the environment; the command line takes precedence.
#[derive(Debug, Default)]
pub(crate) struct Choices {
    pub(crate) context: Option<String>,
    pub(crate) url: Option<String>,
    pub(crate) ca_file: Option<PathBuf>,
    token_argument: Option<PathBuf>,
    token: Option<String>,
    token_file: Option<PathBuf>,
}

impl Choices {
    pub(crate) fn new(global: &Global) -> Self {
        let mut choices = Self {
            ca_file: global
                .ca_file
                .clone()
                .or_else(|| variable("VMWATCH_CA_FILE").map(PathBuf::from)),
            token_argument: global.token_file.clone(),
            token: variable("VMWATCH_TOKEN"),
            token_file: variable("VMWATCH_TOKEN_FILE").map(PathBuf::from),
            context: global.context.clone(),
            url: global.url.clone(),
        };
        // An argument of the one kind overrides a variable of the other.
        if choices.context.is_none() && choices.url.is_none() {
            choices.url = variable("VMWATCH_URL");
            choices.context = variable("VMWATCH_CONTEXT").filter(|_| choices.url.is_none());
        }
        choices
    }

    /// Returns the gateway and a token for it.
    pub(crate) fn connection(&self) -> Result<Connection, CliError> {
        let mut connection = match &self.url {
            Some(url) => Connection {
                url: parse_url(url)?,
                ca_file: None,
                token: None,
            },
            None => stored_connection(
                &ConfigFile::load()?.config,
                self.context.as_deref(),
                self.has_token(),
            )?,
        };
        if let Some(token) = self.token()? {
            connection.token = Some(token);
        }
        if connection.token.is_none() {
            return Err(CliError::NoToken(connection.url.to_string()));
        }
        connection.ca_file = self.ca_file.clone().or(connection.ca_file);
        Ok(connection)
    }

    const fn has_token(&self) -> bool {
        self.token_argument.is_some() || self.token.is_some() || self.token_file.is_some()
    }

    fn token(&self) -> Result<Option<Token>, CliError> {
        if let Some(path) = &self.token_argument {
            return Token::from_file(path).map(Some);
        }
        if let Some(text) = &self.token {
            let token = text
                .parse()
                .map_err(|error| CliError::Usage(format!("VMWATCH_TOKEN: {error}")))?;
            return Ok(Some(token));
        }
        self.token_file.as_deref().map(Token::from_file).transpose()
    }
}

pub(crate) fn parse_url(text: &str) -> Result<GatewayUrl, CliError> {
    text.parse()
        .map_err(|error| CliError::Usage(format!("{text}: {error}")))
}

/// The context with this name or, without a name, the current one.
pub(crate) fn find_context<'a>(
    config: &'a Config,
    name: Option<&'a str>,
) -> Result<(&'a str, &'a Context), CliError> {
    let name = name.or(config.current.as_deref()).ok_or_else(|| {
        CliError::Usage(
            "no gateway is chosen; run `vmwatch login URL` or `vmwatch context use NAME`, or set VMWATCH_URL"
                .to_owned(),
        )
    })?;
    let context = config.contexts.get(name).ok_or_else(|| {
        let names: Vec<&str> = config.contexts.keys().map(String::as_str).collect();
        let known = if names.is_empty() {
            "run `vmwatch login URL` to create one".to_owned()
        } else {
            format!("known: {}", names.join(", "))
        };
        CliError::Usage(format!("there is no context {name}; {known}"))
    })?;
    Ok((name, context))
}

fn stored_connection(config: &Config, name: Option<&str>, has_token: bool) -> Result<Connection, CliError> {
    let (_, context) = find_context(config, name)?;
    let token = match &context.token_file {
        // The token file of the context need not exist if another token is given.
        _ if has_token => None,
        Some(path) => Some(Token::from_file(path)?),
        None => context.token.clone(),
    };
    Ok(Connection {
        url: context.url.clone(),
        ca_file: context.ca_file.clone(),
        token,
    })
}

/// A variable of the environment; an empty one counts as not set.
fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_of_a_context_is_not_sent_to_another_url() {
        let choices = Choices {
            url: Some("https://other.example".to_owned()),
            ..Choices::default()
        };
        let error = choices.connection().unwrap_err();
        assert!(
            matches!(&error, CliError::NoToken(url) if url == "https://other.example"),
            "{error}"
        );
        assert_eq!(error.exit_code(), 77);
    }

    #[test]
    fn given_token_replaces_that_of_the_context() {
        let context = Context {
            url: "https://a.example".parse().unwrap(),
            ca_file: None,
            token_file: Some("/nonexistent/token".into()),
            token: Some("session".parse().unwrap()),
        };
        let config = Config {
            current: Some("lab".to_owned()),
            contexts: [("lab".to_owned(), context)].into(),
        };
        assert!(stored_connection(&config, None, true).unwrap().token.is_none());
        assert!(stored_connection(&config, None, false).is_err());
        let error = stored_connection(&config, Some("other"), true)
            .unwrap_err()
            .to_string();
        assert_eq!(error, "there is no context other; known: lab");
        let error = find_context(&Config::default(), Some("lab"))
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "there is no context lab; run `vmwatch login URL` to create one"
        );
    }
}
