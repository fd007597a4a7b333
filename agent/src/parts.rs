//! Splits a sample into NATS messages of bounded size, called sample parts.

use bytes::Bytes;
use vmwatch_api::{
    InstanceId,
    metrics::{SAMPLE_PART_BYTES, SAMPLE_PART_ROWS, Sample},
    time::CreateDate,
};
use vmwatch_blocks::{Encoder, RowError, SAMPLE_LIMITS, decode_sample, encode_sample};

/// Maximum number of process rows with which a part is certainly decodable.
const FEW_ROWS: usize = 512;

/// A sample part: one NATS message that contains all or some of a sample.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The id `<instance_id>:<create_date>:<part>`, which appears only in logs and traces.
    pub id: String,
    /// The message body: a [`Sample`] in the encoding of [`encode_sample`].
    pub body: Bytes,
}

/// The limits of one sample part.
#[derive(Debug, Clone, Copy)]
struct Limits {
    bytes: usize,
    rows: usize,
}

/// Splits a sample into sample parts within the limits of the API contract. The first one contains the VM's row, the
/// summed rows and the filesystems. Parts are numbered from the sample's `part`, which is 0 unless earlier parts of the same sample were
/// already sent.
pub fn split(sample: Sample, encoder: &mut Encoder) -> Result<Vec<Part>, RowError> {
    let limits = Limits {
        bytes: SAMPLE_PART_BYTES,
        rows: SAMPLE_PART_ROWS,
    };
    split_within(sample, encoder, limits)
}

fn split_within(mut sample: Sample, encoder: &mut Encoder, limits: Limits) -> Result<Vec<Part>, RowError> {
    let mut parts = Vec::new();
    // The process rows that are not encoded yet, in groups; the last group belongs to the next part.
    let mut groups = vec![std::mem::take(&mut sample.processes)];
    while let Some(mut rows) = groups.pop() {
        if rows.len() > limits.rows {
            let rest = rows.split_off(rows.len() / 2);
            groups.extend([rest, rows]);
            continue;
        }
        sample.processes = rows;
        let body = encode_sample(&sample, encoder)?;
        let fits = body.len() <= limits.bytes && is_decodable(&sample, &body);
        // A single row always fits: its texts have at most 1,536 bytes together.
        if !fits && sample.processes.len() > 1 {
            let rest = sample.processes.split_off(sample.processes.len() / 2);
            groups.extend([rest, std::mem::take(&mut sample.processes)]);
            continue;
        }
        parts.push(Part {
            id: part_id(&sample.instance_id, &sample.create_date, sample.part),
            body: body.into_boxed_slice().into(),
        });
        sample.vm = None;
        sample.sums.clear();
        sample.filesystems.clear();
        sample.part += 1;
    }
    Ok(parts)
}

/// Splits a sample part that is too large for NATS into two, each with a part of the process rows; `None` if that is
/// impossible. Both have the number of the part, which appears only in logs and traces.
pub(crate) fn halve(part: &Part, encoder: &mut Encoder) -> Option<[Part; 2]> {
    let mut first = decode_sample(&part.body, SAMPLE_LIMITS).ok()?;
    let has_more = first.vm.is_some() || !first.sums.is_empty() || !first.filesystems.is_empty();
    let rows = first.processes.len();
    if rows == 0 || (rows == 1 && !has_more) {
        return None;
    }
    let processes = first.processes.split_off(rows / 2);
    let second = Sample {
        vm: None,
        sums: Vec::new(),
        filesystems: Vec::new(),
        processes,
        ..first.clone()
    };
    let mut encode = |sample: &Sample| {
        let body = encode_sample(sample, encoder).ok()?;
        let id = part.id.clone();
        let body = body.into_boxed_slice().into();
        Some(Part { id, body })
    };
    Some([encode(&first)?, encode(&second)?])
}

/// Whether metrics-svc accepts the size that the part has in memory when it is decoded. Parts with few rows are not
/// decoded to find out: with the longest texts, they take less than half of what is allowed.
fn is_decodable(sample: &Sample, body: &[u8]) -> bool {
    sample.processes.len() <= FEW_ROWS || decode_sample(body, SAMPLE_LIMITS).is_ok()
}

/// The id of a sample part.
pub(crate) fn part_id(instance_id: &InstanceId, create_date: &CreateDate, part: u32) -> String {
    format!("{instance_id}:{create_date}:{part}")
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};
    use vmwatch_api::metrics::{ProcessOwner, ProcessSample, VmSample};
    use vmwatch_blocks::BlockError;

    use super::*;

    fn row() -> impl Strategy<Value = ProcessSample> {
        let figure = || (0_u32..100_000).prop_map(|tenths| f64::from(tenths) / 10.0);
        (any::<[char; 15]>(), vec(figure(), 4), any::<bool>()).prop_map(|(name, figures, ended)| {
            ProcessSample {
                cmd: name.iter().collect(),
                pid: 0,
                cpu_util: figures[0],
                mem: figures[1],
                disk_read: figures[2],
                disk_write: figures[3],
                running_time: 1_482_236_515.63,
                shutdown_time: ended.then_some(1_482_236_600.123_456),
                ..ProcessSample::default()
            }
        })
    }

    /// Gives each row a pid of its own; a sample has no two rows of the same process.
    fn numbered(rows: Vec<ProcessSample>) -> Vec<ProcessSample> {
        let number = |(pid, row)| ProcessSample { pid, ..row };
        (1..).zip(rows).map(number).collect()
    }

    fn decoded(part: &Part) -> Sample {
        decode_sample(&part.body, SAMPLE_LIMITS).unwrap()
    }

    fn sample(processes: Vec<ProcessSample>) -> Sample {
        Sample {
            instance_id: "6abf5a1e-b85c-4e5f-ba02-f96e22cbd02e".parse().unwrap(),
            create_date: "2017-01-01T21:37:59.001065".parse().unwrap(),
            part: 0,
            net_incoming: 0.6,
            net_outgoing: 5.7,
            vm_cpu: None,
            sums: Vec::new(),
            short_lived: None,
            filesystems: Vec::new(),
            vm: Some(VmSample {
                cpu_util: Some(0.0),
                mem: Some(8.6),
                disk_read: 0.0,
                disk_write: 128.8,
                proc: Some(95),
                ..VmSample::default()
            }),
            processes,
        }
    }

    proptest! {
        #[test]
        fn message_parts_respect_limits_and_contain_all_rows(
            rows in vec(row(), 0..60), bytes in 1024_usize..8192, most_rows in 1_usize..40, first in 0_u32..9,
        ) {
            let whole = Sample { part: first, ..sample(numbered(rows)) };
            let limits = Limits { bytes, rows: most_rows };
            let parts = split_within(whole.clone(), &mut Encoder::new().unwrap(), limits).unwrap();
            let mut rows = Vec::new();
            for (position, part) in parts.iter().enumerate() {
                prop_assert!(part.body.len() <= bytes, "{} bytes", part.body.len());
                let index = first + u32::try_from(position).unwrap();
                let id = format!("6abf5a1e-b85c-4e5f-ba02-f96e22cbd02e:2017-01-01T21:37:59.001065:{index}");
                prop_assert_eq!(&part.id, &id);
                let read = decoded(part);
                prop_assert_eq!(read.part, index);
                prop_assert_eq!(&read.vm, if position == 0 { &whole.vm } else { &None });
                prop_assert_eq!((&read.create_date, read.net_outgoing), (&whole.create_date, whole.net_outgoing));
                prop_assert!(read.processes.len() <= most_rows);
                prop_assert!(position == 0 || !read.processes.is_empty());
                rows.extend(read.processes);
            }
            prop_assert_eq!(rows, whole.processes);
        }
    }

    /// The processes have random names and measures, so that they take as many bytes as possible.
    #[test]
    fn twenty_thousand_processes_take_five_parts_within_all_limits() {
        let mut random = 1_u64;
        let mut next = || {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            random >> 12
        };
        let rows = (0..20_001).map(|pid| {
            let name = (0..64).map(|_| char::from(b'!' + u8::try_from((next() >> 20) % 90).unwrap()));
            let name: String = name.collect();
            // Each has 52 random bits.
            let mut measure = || f64::from_bits(1.0_f64.to_bits() | next());
            ProcessSample {
                cmd: name,
                pid,
                cpu_util: measure(),
                mem: measure(),
                disk_read: measure(),
                disk_write: measure(),
                running_time: measure(),
                shutdown_time: Some(measure()),
                ..ProcessSample::default()
            }
        });
        let whole = sample(rows.collect());
        let parts = split(whole.clone(), &mut Encoder::new().unwrap()).unwrap();
        let sizes: Vec<_> = parts.iter().map(|part| part.body.len()).collect();
        assert_eq!(parts.len(), 5, "{sizes:?}");
        assert!(sizes.iter().all(|size| *size <= SAMPLE_PART_BYTES), "{sizes:?}");
        let rows: Vec<_> = parts.iter().flat_map(|part| decoded(part).processes).collect();
        assert_eq!(rows, whole.processes);
    }

    /// Such texts compress well, so only the size of the decoded rows makes several parts necessary.
    #[test]
    fn rows_with_the_longest_texts_are_split_by_their_decoded_size() {
        let rows = (0..5000).map(|pid| {
            let text = |length| Some(format!("{pid:0length$}"));
            ProcessSample {
                cmd: text(256).unwrap(),
                pid,
                owner: ProcessOwner {
                    user: text(256),
                    unit: text(256),
                    container: text(256),
                    command_line: text(512),
                    ..ProcessOwner::default()
                },
                ..ProcessSample::default()
            }
        });
        let whole = sample(rows.collect());
        let encoded = encode_sample(&whole, &mut Encoder::new().unwrap()).unwrap();
        assert!(encoded.len() <= SAMPLE_PART_BYTES);
        assert_eq!(decode_sample(&encoded, SAMPLE_LIMITS), Err(BlockError::TooLarge));
        let parts = split(whole.clone(), &mut Encoder::new().unwrap()).unwrap();
        let rows: Vec<_> = parts.iter().flat_map(|part| decoded(part).processes).collect();
        assert_eq!(rows, whole.processes);
        let few = Sample {
            processes: whole.processes[..FEW_ROWS].to_vec(),
            ..whole
        };
        assert_eq!(
            split(few, &mut Encoder::new().unwrap()).map(|parts| parts.len()),
            Ok(1)
        );
    }
}
