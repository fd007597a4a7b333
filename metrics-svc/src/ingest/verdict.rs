//! Decides what happens to the messages of a batch, by the database's answers for their documents.

use super::batch::Refused;

/// MongoDB error codes for a fault of the document itself, which a retry cannot fix. Any other code may come from the
/// state of the server (writes blocked, full disk, lock, stepdown) and be transient.
const ROW_FAULTS: [i32; 4] = [
    // BadValue: a value that cannot be stored or indexed.
    2,      // DocumentValidationFailure: an operator's validator refuses it.
    121,    // BSONObjectTooLarge.
    10_334, // KeyTooLong: too long for an index (MongoDB before 4.2).
    17_280,
];

/// What happens to a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// All its rows are stored; acknowledge it.
    Stored,
    /// A row is refused because of its own fault, with the database's message.
    Refused(String),
    /// A row was not stored for a reason that may be transient.
    Retry,
}

/// The verdict on each message of a batch. A message is refused only when all its rows except faulty ones are stored.
pub(super) fn verdicts(messages: usize, refused: &[Refused]) -> Vec<Verdict> {
    let mut verdicts = vec![Verdict::Stored; messages];
    for Refused { source, code, words } in refused {
        let Some(verdict) = verdicts.get_mut(*source) else {
            continue;
        };
        match (ROW_FAULTS.contains(code), &verdict) {
            (false, _) => *verdict = Verdict::Retry,
            (true, Verdict::Stored) => *verdict = Verdict::Refused(words.clone()),
            (true, _) => {}
        }
    }
    verdicts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(source: usize, code: i32) -> Refused {
        Refused {
            source,
            code,
            words: format!("code {code}"),
        }
    }

    #[test]
    fn refuses_only_for_faults_of_the_row_itself() {
        let all = [2, 121, 10_334, 17_280].map(|code| refused(0, code));
        for fault in all {
            assert_eq!(
                verdicts(1, std::slice::from_ref(&fault)),
                [Verdict::Refused(fault.words)]
            );
        }
        // UserWritesBlocked, LockTimeout, MaxTimeMSExpired, OutOfDiskSpace, InterruptedDueToReplStateChange, and a code
        // unknown to all versions of MongoDB.
        for code in [371, 24, 50, 14_031, 11_602, 99_999] {
            assert_eq!(verdicts(1, &[refused(0, code)]), [Verdict::Retry], "{code}");
        }
    }

    #[test]
    fn retries_message_with_transient_failure() {
        for order in [[121, 371], [371, 121]] {
            let both = order.map(|code| refused(1, code));
            assert_eq!(
                verdicts(3, &both),
                [Verdict::Stored, Verdict::Retry, Verdict::Stored]
            );
        }
    }
}
