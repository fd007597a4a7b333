//! The connection to MongoDB, bounded in every wait.

use std::{path::PathBuf, time::Duration};

use mongodb::{
    Client, Database,
    options::{ClientOptions, ReadConcern, ReadPreference, SelectionCriteria, Tls, TlsOptions, WriteConcern},
};
use tracing::{Span, info_span, warn};
use vmwatch_service::{
    config::{Environment, Invalid, Setting, Value},
    telemetry::TRACES_ONLY,
};

/// How long a closing may take: one command to a server that answers takes milliseconds.
const CLOSING_LIMIT: Duration = Duration::from_secs(2);

/// How long the primary waits for a majority before it answers that a write may not be durable. Without it a write waits for
/// ever where the majority is lost and the primary is not, with its connection.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// See [`Setting::help`].
pub const MONGODB_URI: Setting = Setting {
    name: "VMWATCH_MONGODB_URI",
    value: Value::Text,
    default: "mongodb://127.0.0.1:27017",
    help: "MongoDB connection URI",
};
/// See [`Setting::help`].
pub const MONGODB_URI_FILE: Setting = Setting {
    name: "VMWATCH_MONGODB_URI_FILE",
    value: Value::File,
    default: "",
    help: "file with the connection URI, for one with a password",
};
/// See [`Setting::help`].
pub const MONGODB_CA_FILE: Setting = Setting {
    name: "VMWATCH_MONGODB_CA_FILE",
    value: Value::File,
    default: "",
    help: "PEM file with the authorities that sign the MongoDB servers' certificates; enables TLS",
};
/// See [`Setting::help`].
pub const DATABASE: Setting = Setting {
    name: "VMWATCH_DATABASE",
    value: Value::Text,
    default: "vmwatch",
    help: "name of the database",
};
/// See [`Setting::help`].
pub const DATABASE_POOL: Setting = Setting {
    name: "VMWATCH_DATABASE_POOL",
    value: Value::Number(1, 1000),
    default: "32",
    help: "maximum connections to each database server",
};

/// The settings of every program with a database.
pub const SETTINGS: &[Setting] = &[
    MONGODB_URI,
    MONGODB_URI_FILE,
    MONGODB_CA_FILE,
    DATABASE,
    DATABASE_POOL,
];

/// The span of one command to the database, by OpenTelemetry's semantic conventions for MongoDB. The driver's own spans need
/// another version of OpenTelemetry than ours, and would not find their parents. None outside of a request: what a
/// service does of its own accord would be a trace of one span each time.
pub fn command_span(operation: &'static str, collection: &str) -> Span {
    if Span::current().is_none() {
        return Span::none();
    }
    info_span!(
        target: TRACES_ONLY,
        "mongodb",
        otel.name = format!("{operation} {collection}"),
        otel.kind = "client",
        db.system.name = "mongodb",
        db.operation.name = operation,
        db.collection.name = collection,
    )
}

/// How to reach the database.
#[derive(Clone)]
pub struct StoreSettings {
    uri: String,
    ca_file: Option<PathBuf>,
    database: String,
    pool: u32,
}

/// Shows no password.
impl std::fmt::Debug for StoreSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoreSettings")
            .field("database", &self.database)
            .finish_non_exhaustive()
    }
}

impl StoreSettings {
    /// Reads the settings; the file wins over the variable.
    pub fn read(env: &Environment) -> Result<Self, Invalid> {
        let uri = env.get(&MONGODB_URI);
        let file = env.secret_file(&MONGODB_URI_FILE);
        let ca_file = env.optional(&MONGODB_CA_FILE);
        let database = env.get(&DATABASE);
        let pool = env.number(&DATABASE_POOL);
        let uri = uri?;
        Ok(Self {
            uri: file?.unwrap_or(uri),
            ca_file: ca_file?,
            database: database?,
            pool: pool?,
        })
    }

    /// Prepares a client for reads on behalf of requests: they obey the URI's read preference. It connects when it is first
    /// used, and goes on trying for ever.
    pub async fn open(&self, program: &str) -> Result<Database, mongodb::error::Error> {
        let options = self.options(program).await?;
        Ok(Client::with_options(options)?.database(&self.database))
    }

    /// Prepares a client, with a pool of its own, for writes and for reads that later writes rest on. Whatever the URI says,
    /// it writes to the journals of a majority, within [`WRITE_TIMEOUT`], and reads from the primary what a majority has.
    pub async fn open_durable(&self, program: &str) -> Result<Database, mongodb::error::Error> {
        let options = self.durable_options(program).await?;
        Ok(Client::with_options(options)?.database(&self.database))
    }

    async fn durable_options(&self, program: &str) -> Result<ClientOptions, mongodb::error::Error> {
        let mut options = self.options(program).await?;
        let mut concern = WriteConcern::majority();
        concern.journal = Some(true);
        concern.w_timeout = Some(WRITE_TIMEOUT);
        options.write_concern = Some(concern);
        options.read_concern = Some(ReadConcern::majority());
        options.selection_criteria = Some(SelectionCriteria::ReadPreference(ReadPreference::Primary));
        Ok(options)
    }

    async fn options(&self, program: &str) -> Result<ClientOptions, mongodb::error::Error> {
        let mut options = ClientOptions::parse(&self.uri).await?;
        options.app_name = Some(program.to_owned());
        if let Some(ca_file) = &self.ca_file {
            options.tls = Some(Tls::Enabled(trusting(ca_file.clone(), options.tls)));
        }
        options.max_pool_size = Some(self.pool);
        options.connect_timeout = Some(Duration::from_secs(5));
        // Below the five seconds that callers wait: a database that is away is told as such, not as a time-out.
        options
            .server_selection_timeout
            .get_or_insert(Duration::from_secs(3));
        // The driver's own default, 10 s, would leave a frozen server unnoticed for long.
        options.heartbeat_freq.get_or_insert(Duration::from_secs(5));
        Ok(options)
    }
}

/// What the URI says of TLS, with the servers' certificates checked against this file.
fn trusting(ca_file: PathBuf, of_uri: Option<Tls>) -> TlsOptions {
    let mut tls = match of_uri {
        Some(Tls::Enabled(tls)) => tls,
        Some(Tls::Disabled) | None => TlsOptions::default(),
    };
    tls.ca_file_path = Some(ca_file);
    tls
}

/// Ends what the driver does in the background, at the end of a program. A client that is only dropped tells the server of
/// its sessions while the runtime goes, and panics there if its pool went first.
pub async fn close(database: &Database) {
    let closing = database.client().clone().shutdown().immediate(true);
    if tokio::time::timeout(CLOSING_LIMIT, closing).await.is_err() {
        warn!("the database did not take leave: its sessions there end by themselves");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn durable_client_overrides_the_concerns_and_read_preference_of_the_uri() {
        let uri = "mongodb://127.0.0.1/?w=0&journal=false&wtimeoutMS=0&readPreference=secondary&readConcernLevel=local";
        let env = Environment::of([(MONGODB_URI.name, uri)]);
        let settings = StoreSettings::read(&env).unwrap();
        let options = settings.durable_options("test").await.unwrap();
        let concern = options.write_concern.unwrap();
        assert_eq!(concern.w, WriteConcern::majority().w);
        assert_eq!(
            (concern.journal, concern.w_timeout),
            (Some(true), Some(WRITE_TIMEOUT))
        );
        assert_eq!(options.read_concern, Some(ReadConcern::majority()));
        let reads = options.selection_criteria.unwrap();
        assert!(
            matches!(reads, SelectionCriteria::ReadPreference(ReadPreference::Primary)),
            "{reads:?}"
        );
        let of_uri = settings
            .options("test")
            .await
            .unwrap()
            .selection_criteria
            .unwrap();
        assert!(
            matches!(
                of_uri,
                SelectionCriteria::ReadPreference(ReadPreference::Secondary { .. })
            ),
            "requests obey the URI: {of_uri:?}"
        );
    }
}
