//! Errors of metrics-svc, and the faults that callers get for them.

use std::time::Duration;

use vmwatch_api::wire::{Fault, FaultKind};
use vmwatch_bus::{
    BusError,
    audit::AuditError,
    jetstream::JetStreamError,
    provision::{ProvisionError, setup::SetupError},
};

/// Why metrics-svc, one of its commands or a request failed.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// A command to the MongoDB database failed.
    #[error("the row database failed")]
    Store(#[from] mongodb::error::Error),
    /// The database did not answer within this time.
    #[error("the row database did not answer within {0:?}")]
    Unanswered(Duration),
    /// The database refused part of a write.
    #[error("the row database refused a write: {0}")]
    Write(String),
    /// The deadline of a request passed between two database commands.
    #[error("the deadline of the request passed between two commands to the database")]
    DeadlinePassed,
    /// A stored row is not valid BSON.
    #[error("a stored row is not valid BSON")]
    Damaged(#[from] bson::error::Error),
    /// The next page cannot be read, because this page ends at a row without an `ObjectId` or a date, written by
    /// another program.
    #[error("a page ends at a stored row that has no ObjectId or no date")]
    NoCursor,
    /// Retention has deleted the process table from which the previous page was read.
    #[error("the process table of the previous page is no longer stored")]
    TableExpired,
    /// A time range has more rows than may be decoded at once.
    #[error("a time range has more rows than may be decoded at once")]
    TooMuch,
    /// A newer version of vmwatch has written the process names of a VM and day.
    #[error("the process names of a VM and day were written by a newer version")]
    NewerNames,
    /// Rows could not be encoded as JSON.
    #[error("rows could not be encoded")]
    Encode(#[from] serde_json::Error),
    /// A JetStream request failed.
    #[error("JetStream failed")]
    JetStream(#[source] async_nats::Error),
    /// JetStream did not store an evaluation record.
    #[error("JetStream did not store an evaluation record")]
    Evaluation(#[source] JetStreamError),
    /// The connection to the bus failed.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A stream or consumer could not be opened or created.
    #[error(transparent)]
    Provision(#[from] ProvisionError),
    /// The audit record of a command could not be written, and the audit is required.
    #[error("the audit record of the command could not be written, so nothing was done")]
    NotAudited(#[from] AuditError),
    /// The task that stores samples panicked.
    #[error("the task that stores samples panicked; the panic is in the log")]
    IngestionEnded,
    /// The `setup` command failed.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// Reading or writing a file, the terminal or a network connection failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// A command cannot be carried out, for the stated reason.
    #[error("{0}")]
    Refused(String),
}

impl MetricsError {
    /// Wraps an error of JetStream.
    pub fn jetstream(error: impl Into<async_nats::Error>) -> Self {
        Self::JetStream(error.into())
    }

    /// Formats the error and its causes in one line, for the log.
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
            MetricsError::NotAudited(error) => error.into(),
            MetricsError::TooMuch => Self::new(
                FaultKind::Invalid,
                "the time range has more rows than one request may read; choose a shorter range",
            ),
            MetricsError::TableExpired => Self::new(
                FaultKind::NotFound,
                "the process table of the previous page is no longer stored; start again with the first page",
            ),
            other => {
                Self::new(FaultKind::Internal, "an internal error occurred; it was logged").caused_by(other)
            }
        }
    }
}
