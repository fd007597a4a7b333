//! The documented API of 2017 as one table: method codes, the bus methods behind them, success texts, shapes of answers with
//! their key order, and status codes. Exposing a bus method under a code takes one row in [`TABLE`] and one golden file.

use vmwatch_api::{
    Method, MethodInfo,
    auth::Login,
    lifecycle::Start,
    metrics::{ProcessByName, ProcessLatest, VmLatest},
    wire::FaultKind,
};

/// A row of the table.
#[derive(Debug, Clone, Copy)]
pub struct Documented {
    /// The method code.
    pub code: u32,
    /// The document's name of the method; shown in the answer to an unknown code.
    pub name: &'static str,
    /// The bus method that answers.
    pub method: MethodInfo,
    /// The document's success text, with its spelling.
    pub success: &'static str,
    /// The shape of the answer.
    pub shape: Shape,
}

/// All documented methods, in the order in which the answer to an unknown code lists them.
pub const TABLE: &[Documented] = &[
    Documented {
        code: 458_753,
        name: "login",
        method: Login::INFO,
        success: "User authenticated sucessfully...",
        shape: Shape::Session,
    },
    Documented {
        code: 611_711,
        name: "getVMMonitoringProcData",
        method: ProcessLatest::INFO,
        success: "success query proc information",
        shape: Shape::Rows,
    },
    Documented {
        code: 611_611,
        name: "getVMMonitoringData",
        method: VmLatest::INFO,
        success: "success query vm information",
        shape: Shape::Rows,
    },
    Documented {
        code: 611_712,
        name: "getVMMonitoringProcByNameData",
        method: ProcessByName::INFO,
        success: "success query proc information",
        shape: Shape::Rows,
    },
    Documented {
        code: 32_523,
        name: "startmonitor",
        method: Start::INFO,
        success: "",
        shape: Shape::Null,
    },
];

/// What an answer contains, and in which order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// The reply is a [`vmwatch_api::auth::Session`]; the answer carries its `session_id` and no `data`.
    Session,
    /// The reply is a page of rows; `data` holds the rows of all pages.
    Rows,
    /// `data` is null whatever the reply.
    Null,
}

/// A key of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Key {
    StatusCode,
    SessionId,
    MessageId,
    Message,
    Data,
    Method,
}

impl Shape {
    /// The keys of an answer, in the order of the document's sample.
    pub(super) const fn keys(self) -> &'static [Key] {
        match self {
            Self::Session => &[
                Key::StatusCode,
                Key::Message,
                Key::Method,
                Key::SessionId,
                Key::MessageId,
            ],
            Self::Rows | Self::Null => &[
                Key::StatusCode,
                Key::SessionId,
                Key::MessageId,
                Key::Message,
                Key::Data,
                Key::Method,
            ],
        }
    }
}

/// The documented `status_code` (docs/api/wire-contract.md, "Answer"). The document also defines 2 (success), which none
/// of its samples uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    /// Every success.
    Created = 1,
    /// Every failure but a timeout.
    Failure = 3,
    /// The deadline passed before the service answered.
    Timeout = 4,
}

impl From<FaultKind> for Status {
    fn from(kind: FaultKind) -> Self {
        match kind {
            FaultKind::Timeout => Self::Timeout,
            _ => Self::Failure,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn codes_and_names_are_unique() {
        let codes: HashSet<_> = TABLE.iter().map(|row| row.code).collect();
        let names: HashSet<_> = TABLE.iter().map(|row| row.name).collect();
        assert_eq!((codes.len(), names.len()), (TABLE.len(), TABLE.len()));
    }

    #[test]
    fn timeout_has_status_4_and_all_other_faults_3() {
        assert_eq!(Status::from(FaultKind::Timeout) as u8, 4);
        assert_eq!(Status::from(FaultKind::Internal) as u8, 3);
    }

    #[test]
    fn codes_reach_the_subjects_of_the_contract() {
        let rows: Vec<_> = TABLE
            .iter()
            .map(|row| (row.code, row.name, row.method.full_subject()))
            .collect();
        let expected = [
            (458_753, "login", "vmwatch.v1.auth.login"),
            (
                611_711,
                "getVMMonitoringProcData",
                "vmwatch.v1.metrics.process.latest",
            ),
            (611_611, "getVMMonitoringData", "vmwatch.v1.metrics.vm.latest"),
            (
                611_712,
                "getVMMonitoringProcByNameData",
                "vmwatch.v1.metrics.process.by_name",
            ),
            (32_523, "startmonitor", "vmwatch.v1.lifecycle.start"),
        ];
        assert_eq!(
            rows,
            expected.map(|(code, name, subject)| (code, name, subject.to_owned()))
        );
    }
}
