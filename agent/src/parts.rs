//! Splits a sample into NATS messages of bounded size, called sample parts.

use std::io::Write;

use bytes::Bytes;
use serde::Serialize;
use vmwatch_api::{
    InstanceId,
    metrics::{SAMPLE_PART_BYTES, SAMPLE_PART_ROWS, Sample},
    time::CreateDate,
};

/// A sample part: one NATS message that contains all or some of a sample.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The id `<instance_id>:<create_date>:<part>`, which appears only in logs and traces.
    pub id: String,
    /// The message body: a [`Sample`] as JSON.
    pub body: Bytes,
}

/// The limits of one sample part.
#[derive(Debug, Clone, Copy)]
struct Limits {
    bytes: usize,
    rows: usize,
}

/// Splits a sample into sample parts within the limits of the API contract; the first one contains the VM's row. Parts
/// are numbered from the sample's `part`, which is 0 unless earlier parts of the same sample were already sent.
pub fn split(sample: Sample) -> serde_json::Result<Vec<Part>> {
    let limits = Limits {
        bytes: SAMPLE_PART_BYTES,
        rows: SAMPLE_PART_ROWS,
    };
    split_within(sample, limits)
}

fn split_within(mut sample: Sample, limits: Limits) -> serde_json::Result<Vec<Part>> {
    let whole = Bytes::from(serde_json::to_vec(&sample)?);
    if whole.len() <= limits.bytes && sample.processes.len() <= limits.rows {
        return Ok(vec![Part {
            id: id_of(&sample),
            body: whole,
        }]);
    }
    drop(whole);
    let mut parts = Vec::new();
    let mut rows = std::mem::take(&mut sample.processes).into_iter().peekable();
    loop {
        let mut bytes = json_length(&sample)? + r#","processes":[]"#.len();
        while let Some(row) = rows.peek() {
            // The first row of a sample part always fits, because a row takes less than 10 KiB (its texts have at most
            // 1,536 bytes together).
            bytes += json_length(row)? + ",".len();
            let full = bytes > limits.bytes || sample.processes.len() == limits.rows;
            if full && !sample.processes.is_empty() {
                break;
            }
            sample.processes.extend(rows.next());
        }
        parts.push(Part {
            id: id_of(&sample),
            body: serde_json::to_vec(&sample)?.into(),
        });
        if rows.peek().is_none() {
            break;
        }
        sample.vm = None;
        sample.processes.clear();
        sample.part += 1;
    }
    Ok(parts)
}

fn id_of(sample: &Sample) -> String {
    part_id(&sample.instance_id, &sample.create_date, sample.part)
}

/// The id of a sample part.
pub(crate) fn part_id(instance_id: &InstanceId, create_date: &CreateDate, part: u32) -> String {
    format!("{instance_id}:{create_date}:{part}")
}

fn json_length(value: &impl Serialize) -> serde_json::Result<usize> {
    let mut length = Length(0);
    serde_json::to_writer(&mut length, value)?;
    Ok(length.0)
}

/// A writer that only counts the bytes written to it.
struct Length(usize);

impl Write for Length {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};
    use vmwatch_api::metrics::{ProcessSample, VmSample};

    use super::*;

    fn row() -> impl Strategy<Value = ProcessSample> {
        let figure = || (0_u32..100_000).prop_map(|tenths| f64::from(tenths) / 10.0);
        (any::<[char; 15]>(), any::<u32>(), vec(figure(), 4), any::<bool>()).prop_map(
            |(name, pid, figures, ended)| ProcessSample {
                cmd: name.iter().collect(),
                pid,
                cpu_util: figures[0],
                mem: figures[1],
                disk_read: figures[2],
                disk_write: figures[3],
                running_time: 1_482_236_515.63,
                shutdown_time: ended.then_some(1_482_236_600.123_456),
                ..ProcessSample::default()
            },
        )
    }

    fn sample(processes: Vec<ProcessSample>) -> Sample {
        Sample {
            instance_id: "6abf5a1e-b85c-4e5f-ba02-f96e22cbd02e".parse().unwrap(),
            create_date: "2017-01-01T21:37:59.001065".parse().unwrap(),
            part: 0,
            net_incoming: 0.6,
            net_outgoing: 5.7,
            vm_cpu: None,
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
            rows in vec(row(), 0..60), bytes in 2048_usize..16_384, most_rows in 1_usize..40, first in 0_u32..9,
        ) {
            let whole = Sample { part: first, ..sample(rows) };
            let parts = split_within(whole.clone(), Limits { bytes, rows: most_rows }).unwrap();
            let mut rows = Vec::new();
            for (position, part) in parts.iter().enumerate() {
                prop_assert!(part.body.len() <= bytes, "{} bytes", part.body.len());
                let index = first + u32::try_from(position).unwrap();
                let id = format!("6abf5a1e-b85c-4e5f-ba02-f96e22cbd02e:2017-01-01T21:37:59.001065:{index}");
                prop_assert_eq!(&part.id, &id);
                let read: Sample = serde_json::from_slice(&part.body).unwrap();
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

    #[test]
    fn message_parts_are_filled_to_the_limit() {
        let mut rows = Vec::new();
        let mut row = sample(vec![]);
        row.vm = None;
        for pid in 0..20_000 {
            rows.push(ProcessSample {
                cmd: "kworker/u8:3-ev".into(),
                pid,
                cpu_util: 0.1,
                mem: 0.1,
                disk_read: 0.0,
                disk_write: 0.0,
                running_time: 1_482_236_515.63,
                ..ProcessSample::default()
            });
        }
        let parts = split(sample(rows)).unwrap();
        let (last, full) = parts.split_last().unwrap();
        assert!(full.iter().all(|part| part.body.len() > SAMPLE_PART_BYTES - 512));
        assert!(last.body.len() <= SAMPLE_PART_BYTES);
    }
}
