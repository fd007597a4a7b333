//! Decides whether each message of a batch is acknowledged, refused or retried, by the database's answers for its
//! documents.

use super::batch::Refused;

/// MongoDB error code `BadValue`, also used for rows that no block can hold.
pub(super) const BAD_VALUE: i32 = 2;

/// MongoDB error codes for a fault of the document itself, which a retry cannot fix: `BadValue`,
/// `DocumentValidationFailure` (from a validator that an administrator added), `BSONObjectTooLarge` and `KeyTooLong`
/// (MongoDB before 4.2). All other codes may be transient, because they may come from the state of the server: writes
/// blocked, full disk, lock, stepdown.
const ROW_FAULTS: [i32; 4] = [BAD_VALUE, 121, 10_334, 17_280];

/// What happens to a message after its batch was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// All rows of the message are stored: acknowledge it.
    Stored,
    /// A row of the message is faulty and was refused with this error message: publish the message as a dead letter.
    Refused(String),
    /// A row of the message was not stored for a reason that may be transient: write it again.
    Retry,
}

/// Decides on each message of a batch. A message is refused only if all its rows except the faulty ones are stored.
pub(super) fn verdicts(messages: usize, refused: &[Refused]) -> Vec<Verdict> {
    let mut verdicts = vec![Verdict::Stored; messages];
    for Refused {
        source, code, words, ..
    } in refused
    {
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
            rows: 1,
            code,
            words: format!("code {code}"),
        }
    }

    #[test]
    fn message_is_refused_only_for_faults_of_its_rows() {
        let all = [2, 121, 10_334, 17_280].map(|code| refused(0, code));
        for fault in all {
            assert_eq!(
                verdicts(1, std::slice::from_ref(&fault)),
                [Verdict::Refused(fault.words)]
            );
        }
        // In this order: UserWritesBlocked, LockTimeout, MaxTimeMSExpired, OutOfDiskSpace,
        // InterruptedDueToReplStateChange, and a code that no version of MongoDB uses.
        for code in [371, 24, 50, 14_031, 11_602, 99_999] {
            assert_eq!(verdicts(1, &[refused(0, code)]), [Verdict::Retry], "{code}");
        }
    }

    #[test]
    fn message_with_transient_failure_is_retried() {
        for order in [[121, 371], [371, 121]] {
            let both = order.map(|code| refused(1, code));
            assert_eq!(
                verdicts(3, &both),
                [Verdict::Stored, Verdict::Retry, Verdict::Stored]
            );
        }
    }
}
