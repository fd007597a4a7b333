//! Table of the methods of the documented API of 2017: their codes, the bus methods that answer them, success messages,
//! answer shapes with key order, and status codes. To expose another bus method under a code, add a row to [`TABLE`]
//! and a golden file.

use vmwatch_api::{
    Method, MethodInfo,
    auth::Login,
    lifecycle::Start,
    metrics::{ProcessByName, ProcessLatest, VmLatest},
    wire::FaultKind,
};

/// A method of the documented API.
#[derive(Debug, Clone, Copy)]
pub struct Documented {
    /// Number with which clients select this method.
    pub code: u32,
    /// Name of the method in the API document, shown to clients that send an unknown code.
    pub name: &'static str,
    /// Bus method that answers requests with this method code.
    pub method: MethodInfo,
    /// Success message from the API document, with its misspellings.
    pub success: &'static str,
    /// Shape of the method's answer: which keys it has.
    pub shape: Shape,
}

/// All methods of the documented API, in the order in which they are listed to clients that send an unknown code.
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

/// Shape of an answer of the documented API: which keys it has, and in which order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// For a [`vmwatch_api::auth::Session`] as reply: the answer has its `session_id` and no `data`.
    Session,
    /// For pages of rows as reply: `data` holds the rows of all pages.
    Rows,
    /// The answer has `data: null`, whatever the service replied.
    Null,
}

/// A key of an answer of the documented API.
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
    /// Keys of an answer, in the order of the samples in the API document.
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

/// The `status_code` of the documented API (docs/api/wire-contract.md, "Answer"). The API document also defines 2
/// (success), but none of its samples uses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    /// Status of every successful answer.
    Created = 1,
    /// Status of the answer to every failure other than a timeout.
    Failure = 3,
    /// Status of the answer if the deadline passed before the service answered.
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
    fn codes_and_names_of_documented_methods_are_unique() {
        let codes: HashSet<_> = TABLE.iter().map(|row| row.code).collect();
        let names: HashSet<_> = TABLE.iter().map(|row| row.name).collect();
        assert_eq!((codes.len(), names.len()), (TABLE.len(), TABLE.len()));
    }

    #[test]
    fn documented_status_is_4_for_timeouts_and_3_for_other_faults() {
        assert_eq!(Status::from(FaultKind::Timeout) as u8, 4);
        assert_eq!(Status::from(FaultKind::Internal) as u8, 3);
    }

    #[test]
    fn documented_codes_map_to_the_bus_subjects_of_the_contract() {
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
