//! What can go wrong in metrics-svc, and what a caller is told of it.

use std::time::Duration;

use vmwatch_api::wire::{Fault, FaultKind};
use vmwatch_bus::{
    BusError,
    audit::AuditError,
    provision::{ProvisionError, setup::SetupError},
};

/// A failure of metrics-svc.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The database failed.
    #[error("the row database failed")]
    Store(#[from] mongodb::error::Error),
    /// The database did not answer for so long.
    #[error("the row database did not answer within {0:?}")]
    Unanswered(Duration),
    /// The database did not carry out a part of a command.
    #[error("the row database refused a write: {0}")]
    Write(String),
    /// Nobody waits for the result any more.
    #[error("the deadline of the request passed between two commands to the database")]
    DeadlinePassed,
    /// A stored row is no BSON.
    #[error("a stored row is damaged")]
    Damaged(#[from] bson::error::Error),
    /// A list cannot go on behind a row that another reporter stored without an `ObjectId` or a date.
    #[error("a page ends at a stored row that has no ObjectId or no date")]
    NoPlace,
    /// The page before ended in a table that is no longer stored.
    #[error("the process table of the page before is no longer stored")]
    GoneTable,
    /// Rows could not be encoded.
    #[error("rows could not be encoded")]
    Encode(#[from] serde_json::Error),
    /// JetStream failed.
    #[error("JetStream failed")]
    JetStream(#[source] async_nats::Error),
    /// The bus could not be used.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A stream or consumer could not be opened or made.
    #[error(transparent)]
    Provision(#[from] ProvisionError),
    /// The audit is required and takes no record.
    #[error("the command could not be recorded in the audit, so nothing was done")]
    NotAudited(#[from] AuditError),
    /// The task that stores samples panicked.
    #[error("ingestion ended before the service; the panic is in the log")]
    IngestionEnded,
    /// The command `setup` failed.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// A listener, file or terminal failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// A command cannot be carried out; the text says why.
    #[error("{0}")]
    Refused(String),
}

impl MetricsError {
    /// A failure of JetStream.
    pub fn jetstream(error: impl Into<async_nats::Error>) -> Self {
        Self::JetStream(error.into())
    }

    /// The error and its sources in one line, for the log.
    pub fn cause(&self) -> String {
        let mut text = self.to_string();
        let mut next = std::error::Error::source(self);
        while let Some(source) = next {
            text = format!("{text}: {source}");
            next = source.source();
        }
        text
    }
}

impl From<MetricsError> for Fault {
    fn from(error: MetricsError) -> Self {
        match error {
            MetricsError::Store(_) | MetricsError::Write(_) => Self::new(
                FaultKind::Backend,
                "rows cannot be read at the moment; try again shortly",
            )
            .caused_by(error),
            MetricsError::DeadlinePassed => Self::new(
                FaultKind::Timeout,
                "the deadline passed before the service answered",
            ),
            MetricsError::GoneTable => Self::new(
                FaultKind::NotFound,
                "the process table of the page before is no longer stored; begin with the first page",
            ),
            other => Self::new(
                FaultKind::Internal,
                "the query failed on our side; it is in the log",
            )
            .caused_by(other),
        }
    }
}
