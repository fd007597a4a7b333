//! The command `vmwatch-auth user`. It reads passwords from a prompt or from standard input, never from an argument,
//! because other processes on the machine can read the arguments.

use std::{
    io::{IsTerminal, Write as _},
    time::Duration,
};

use clap::Subcommand;
use serde::Serialize;
use vmwatch_api::{
    InstanceId, Method, MethodInfo, NewUserName, Role, Scope, Service, UserName,
    users::{NewPassword, NewUser, UsersAdd, UsersRemove, UsersSetPassword},
};
use vmwatch_bus::{Bus, audit::Audit};

use crate::{
    AuthError,
    accounts::Accounts,
    audit,
    config::AuthSettings,
    mirror::Mirror,
    password::Hasher,
    sessions::Sessions,
    store::{User, UserStore},
};

/// How long a command on users waits for the NATS server.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Maximum number of users in the output of the `list` command; a private cloud has tens of users.
const MOST_LISTED: usize = 1000;

#[derive(Debug, Subcommand)]
pub enum UserCommand {
    /// Add a user.
    Add {
        /// User name: up to 128 letters and digits of one script and ASCII punctuation. Letter case is ignored when
        /// names are compared.
        name: NewUserName,
        /// Role: viewer, operator or admin.
        #[arg(long, default_value = "viewer")]
        role: Role,
        /// Comma-separated instance ids of the VMs that the user may see; default: all VMs.
        #[arg(long, value_delimiter = ',')]
        instances: Option<Vec<InstanceId>>,
        /// Add a service account: a user without a password that cannot log in and acts only through API tokens.
        #[arg(long)]
        service: bool,
    },
    /// Change a user's password; this ends the user's sessions.
    Password {
        /// User name; letter case is ignored.
        name: UserName,
    },
    /// List the users.
    List {
        /// Print the users as JSON, for scripts.
        #[arg(long)]
        json: bool,
    },
    /// Remove a user; this ends the user's sessions.
    Remove {
        /// User name; letter case is ignored.
        name: UserName,
    },
}

/// Runs a command on users.
pub async fn run(command: UserCommand, settings: &AuthSettings) -> Result<(), AuthError> {
    let database = settings.store.open_durable(Service::Auth.name()).await?;
    let users = UserStore::new(&database, &settings.collection);
    let done = Box::pin(carry_out(command, users, settings)).await;
    vmwatch_store::close(&database).await;
    done
}

async fn carry_out(command: UserCommand, users: UserStore, settings: &AuthSettings) -> Result<(), AuthError> {
    match command {
        UserCommand::Add {
            name,
            role,
            instances,
            service,
        } => {
            let password = if service {
                None
            } else {
                Some(read_password(name.as_name())?)
            };
            let user = NewUser {
                password,
                name: name.clone(),
                role,
                scope: instances.map_or(Scope::All, Scope::Only),
            };
            let added = Box::pin(async {
                let user = accounts(users, settings).await?.add(user).await?;
                println!("added {} as {role}", user.name);
                Ok(())
            });
            announced(settings, UsersAdd::INFO, name.as_name(), added).await?;
        }
        UserCommand::Password { name } => {
            let name = stored_name(&users, name).await?;
            let password = read_password(&name)?;
            let changed = Box::pin(async {
                let accounts = accounts(users, settings).await?;
                let ended = accounts.set_password(&name, password).await?;
                println!("changed the password of {name}\nended {ended} sessions of {name}");
                Ok(())
            });
            announced(settings, UsersSetPassword::INFO, &name, changed).await?;
        }
        UserCommand::List { json } => list(&users.list(None, MOST_LISTED).await?, json)?,
        UserCommand::Remove { name } => {
            let name = stored_name(&users, name).await?;
            let removed = Box::pin(async {
                let ended = accounts(users, settings).await?.remove(&name).await?;
                println!("removed {name}\nended {ended} sessions of {name}");
                Ok(())
            });
            announced(settings, UsersRemove::INFO, &name, removed).await?;
        }
    }
    Ok(())
}

/// The user name as stored; if the user does not exist, the name as given.
async fn stored_name(users: &UserStore, given: UserName) -> Result<UserName, AuthError> {
    let user = users.find(&given.key()).await?;
    Ok(user.map_or(given, |user| user.name))
}

/// Connects to NATS without waiting for the connection. If NATS becomes unreachable after the audit record was written,
/// or is unreachable while the audit is not required, the change is still stored. The error then says that the change
/// is not in effect yet.
async fn accounts(users: UserStore, settings: &AuthSettings) -> Result<Accounts, AuthError> {
    let bus = Bus::connect(&format!("{}-users", Service::Auth.name()), &settings.bus).await?;
    Ok(Accounts {
        users,
        hasher: Hasher::new(1)?,
        mirror: Mirror::existing(&bus),
        sessions: Sessions::existing(&bus, &settings.sessions),
    })
}

/// Makes a change and writes one audit record before and one after it.
async fn announced(
    settings: &AuthSettings,
    action: MethodInfo,
    name: &UserName,
    change: impl Future<Output = Result<(), AuthError>>,
) -> Result<(), AuthError> {
    let program = format!("{}-users", Service::Auth.name());
    let bus = match Bus::connect_within(&program, &settings.bus, CONNECT_LIMIT).await {
        Ok(bus) => bus,
        Err(error) if settings.audit_required => {
            return Err(refused(format!(
                "{error}: the change could not be recorded in the audit, so it was not made"
            )));
        }
        Err(error) => {
            eprintln!("the change will not be recorded in the audit: {error}");
            return change.await;
        }
    };
    let context = audit::own_context();
    let audit = Audit::new(&bus, settings.audit_required);
    audit::announced(&audit, &context, action, &name.shown(), change).await
}

fn refused(text: String) -> AuthError {
    AuthError::Refused(text)
}

/// Reads a password: from a terminal by prompting twice, otherwise from the first line of standard input.
fn read_password(name: &UserName) -> Result<NewPassword, AuthError> {
    let text = if std::io::stdin().is_terminal() {
        let first = rpassword::prompt_password(format!("New password of {name}: "))?;
        if first != rpassword::prompt_password("Repeat the password: ")? {
            return Err(refused(
                "the two passwords differ; no password was changed".to_owned(),
            ));
        }
        first
    } else {
        let mut line = String::new();
        std::io::stdin().read_line(&mut line)?;
        line.trim_end_matches(['\r', '\n']).to_owned()
    };
    text.parse().map_err(|rule| refused(format!("a password {rule}")))
}

#[derive(Serialize)]
struct Listed<'a> {
    name: &'a UserName,
    role: Role,
    instances: Option<&'a [InstanceId]>,
    service: bool,
    created: String,
}

fn list(users: &[User], json: bool) -> Result<(), AuthError> {
    let listed: Vec<_> = users
        .iter()
        .map(|user| Listed {
            name: &user.name,
            role: user.role,
            instances: match &user.scope {
                Scope::All => None,
                Scope::Only(instances) => Some(instances),
                Scope::Unknown => Some(&[]),
            },
            service: user.service,
            created: user.created.try_to_rfc3339_string().unwrap_or_default(),
        })
        .collect();
    let mut out = std::io::stdout().lock();
    if json {
        serde_json::to_writer_pretty(&mut out, &listed)?;
        writeln!(out)?;
        return Ok(());
    }
    let width = listed
        .iter()
        .map(|user| user.name.as_str().chars().count())
        .max()
        .unwrap_or(0)
        .max(4);
    writeln!(
        out,
        "{:width$}  {:8}  {:20}  INSTANCES",
        "NAME", "ROLE", "CREATED"
    )?;
    for user in listed {
        let instances = user.instances.map_or("all".to_owned(), |instances| {
            instances
                .iter()
                .map(InstanceId::as_str)
                .collect::<Vec<_>>()
                .join(",")
        });
        let (role, created) = (user.role.to_string(), &user.created);
        writeln!(
            out,
            "{:width$}  {role:8}  {created:20.20}  {instances}",
            user.name.as_str()
        )?;
    }
    Ok(())
}
