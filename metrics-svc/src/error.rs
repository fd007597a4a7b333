//! Errors of metrics-svc, and the faults that callers get for them.

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
    /// The database did not answer within this time.
    #[error("the row database did not answer within {0:?}")]
    Unanswered(Duration),
    /// The database refused part of a command.
    #[error("the row database refused a write: {0}")]
    Write(String),
    /// The deadline passed, so the result is not needed any more.
    #[error("the deadline of the request passed between two commands to the database")]
    DeadlinePassed,
    /// A stored row is not valid BSON.
    #[error("a stored row is damaged")]
    Damaged(#[from] bson::error::Error),
    /// A page cannot be continued after a row that a program other than vmwatch stored without an `ObjectId` or a date.
    #[error("a page ends at a stored row that has no ObjectId or no date")]
    NoCursor,
    /// The process table on which the previous page ended is no longer stored.
    #[error("the process table of the previous page is no longer stored")]
    TableExpired,
    /// Rows could not be encoded.
    #[error("rows could not be encoded")]
    Encode(#[from] serde_json::Error),
    /// JetStream failed.
    #[error("JetStream failed")]
    JetStream(#[source] async_nats::Error),
    /// The bus could not be used.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A stream or consumer could not be opened or created.
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
                "the row database is unreachable; try again shortly",
            )
            .caused_by(error),
            MetricsError::DeadlinePassed => Self::new(
                FaultKind::Timeout,
                "the deadline passed before the service answered",
            ),
            MetricsError::TableExpired => Self::new(
                FaultKind::NotFound,
                "the process table of the previous page is no longer stored; start again with the first page",
            ),
            other => Self::new(
                FaultKind::Internal,
                "the query failed because of an internal error, which was logged",
            )
            .caused_by(other),
        }
    }
}
