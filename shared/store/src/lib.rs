//! The connection to MongoDB. Every wait has a time limit.

#![expect(
    missing_docs,
    reason = "the names of some settings, fields and errors are sufficient documentation"
)]

use std::{path::PathBuf, time::Duration};

use mongodb::{
    Client, Database,
    options::{
        ClientOptions, ReadConcern, ReadPreference, SelectionCriteria, ServerAddress, Tls, TlsOptions,
        WriteConcern,
    },
};
use tracing::{Span, info_span, warn};
use vmwatch_service::{
    config::{Environment, Invalid, Setting, Value},
    telemetry::TRACES_ONLY,
};

/// Time limit for closing the MongoDB client. Closing sends one command, which takes milliseconds if the server is
/// reachable.
const CLOSING_LIMIT: Duration = Duration::from_secs(2);

/// How long the MongoDB primary waits for a majority of replicas before it reports that a write may not be durable.
/// Without this limit, a write and its connection would wait forever while the primary is up but has lost the majority.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

pub const MONGODB_URI: Setting = Setting {
    name: "VMWATCH_MONGODB_URI",
    value: Value::Text,
    default: "mongodb://127.0.0.1:27017",
    help: "connection URI of MongoDB; must not contain a password (use VMWATCH_MONGODB_URI_FILE instead)",
};
pub const MONGODB_URI_FILE: Setting = Setting {
    name: "VMWATCH_MONGODB_URI_FILE",
    value: Value::File,
    default: "",
    help: "path of a file with the MongoDB connection URI; use it if the URI contains a password",
};
pub const MONGODB_CA_FILE: Setting = Setting {
    name: "VMWATCH_MONGODB_CA_FILE",
    value: Value::File,
    default: "",
    help: "path of the PEM file with the certificate authorities that sign the MongoDB servers' certificates; enables TLS",
};
pub const DATABASE: Setting = Setting {
    name: "VMWATCH_DATABASE",
    value: Value::Text,
    default: "vmwatch",
    help: "name of the MongoDB database",
};
pub const DATABASE_POOL: Setting = Setting {
    name: "VMWATCH_DATABASE_POOL",
    value: Value::Number(1, 1000),
    default: "32",
    help: "maximum number of connections to each MongoDB server",
};

/// The database settings of every program that uses MongoDB.
pub const SETTINGS: &[Setting] = &[
    MONGODB_URI,
    MONGODB_URI_FILE,
    MONGODB_CA_FILE,
    DATABASE,
    DATABASE_POOL,
];

/// Creates the trace span of a MongoDB command, with the names of OpenTelemetry's semantic conventions for MongoDB. The
/// MongoDB driver's own spans are not used: the driver depends on a different version of OpenTelemetry, so its
/// spans would have no parent. Commands of background work get no span, because each would produce a separate trace.
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

/// The configuration of the connection to MongoDB.
#[derive(Clone)]
pub struct StoreSettings {
    uri: String,
    ca_file: Option<PathBuf>,
    database: String,
    pool: u32,
}

/// Implemented by hand to omit the password.
impl std::fmt::Debug for StoreSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoreSettings")
            .field("database", &self.database)
            .finish_non_exhaustive()
    }
}

impl StoreSettings {
    /// Reads the database settings. The file with the URI takes precedence over the URI in the environment variable.
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

    /// Creates a client for reads on behalf of requests. These reads follow the read preference of the URI. The client
    /// connects when it is first used and retries without limit.
    pub async fn open(&self, program: &str) -> Result<Database, mongodb::error::Error> {
        let options = self.options(program).await?;
        Ok(Client::with_options(options)?.database(&self.database))
    }

    /// Creates a client with its own connection pool for writes and for reads that writes depend on. Whatever the URI
    /// says, each write must reach the journals of a majority within [`WRITE_TIMEOUT`], and reads return
    /// majority-committed data from the primary.
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

    /// The hosts and ports of the MongoDB servers in the URI.
    pub async fn addresses(&self) -> Result<Vec<(String, u16)>, mongodb::error::Error> {
        let options = ClientOptions::parse(&self.uri).await?;
        let servers = options.hosts.into_iter().filter_map(|server| match server {
            ServerAddress::Tcp { host, port } => Some((host, port.unwrap_or(27_017))),
            // A Unix socket or a kind of a newer driver: it has no address that a receiver could have.
            _ => None,
        });
        Ok(servers.collect())
    }

    async fn options(&self, program: &str) -> Result<ClientOptions, mongodb::error::Error> {
        let mut options = ClientOptions::parse(&self.uri).await?;
        options.app_name = Some(program.to_owned());
        if let Some(ca_file) = &self.ca_file {
            options.tls = Some(Tls::Enabled(trusting(ca_file.clone(), options.tls)));
        }
        options.max_pool_size = Some(self.pool);
        options.connect_timeout = Some(Duration::from_secs(5));
        // Callers wait five seconds. This time-out is shorter, so that callers learn that the database is unreachable
        // before they time out themselves.
        options
            .server_selection_timeout
            .get_or_insert(Duration::from_secs(3));
        // The MongoDB driver's default interval of 10 s would detect a frozen server too late.
        options.heartbeat_freq.get_or_insert(Duration::from_secs(5));
        Ok(options)
    }
}

/// Returns the TLS options of the URI, with the given file as the authority for server certificates.
fn trusting(ca_file: PathBuf, of_uri: Option<Tls>) -> TlsOptions {
    let mut tls = match of_uri {
        Some(Tls::Enabled(tls)) => tls,
        Some(Tls::Disabled) | None => TlsOptions::default(),
    };
    tls.ca_file_path = Some(ca_file);
    tls
}

/// Shuts down the MongoDB client when a program ends. If a client is only dropped, it ends its server sessions while
/// the async runtime stops, and panics if the client's connection pool was dropped before that.
pub async fn close(database: &Database) {
    let closing = database.client().clone().shutdown().immediate(true);
    if tokio::time::timeout(CLOSING_LIMIT, closing).await.is_err() {
        warn!("MongoDB client shutdown timed out; server sessions will expire on their own");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn durable_client_overrides_write_concern_read_concern_and_read_preference_of_uri() {
        let uri = "mongodb://127.0.0.1/?w=0&journal=false&wtimeoutMS=0&readPreference=secondary&readConcernLevel=local";
        let env = Environment::from_variables([(MONGODB_URI.name, uri)]);
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
            "reads on behalf of requests must follow the URI: {of_uri:?}"
        );
    }
}
