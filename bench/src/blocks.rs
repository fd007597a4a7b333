//! Writes long histories as blocks of level 1, as compaction does, because ingestion would take too long.

use bson::{Binary, DateTime, RawBsonRef, RawDocument, RawDocumentBuf, rawdoc, spec::BinarySubtype};
use metrics_svc::documents::Documents;
use mongodb::{
    Collection, Database,
    options::{Acknowledgment, WriteConcern},
};
use vmwatch_api::{InstanceId, metrics::Sample, time::UtcOffset};
use vmwatch_blocks::{Encoded, Encoder, Kind, Rows, Value};

/// An hour in microseconds.
const HOUR: i64 = 3_600_000_000;
/// Time until the blocks expire, in microseconds: 50 years.
const KEPT: i64 = 50 * 365 * 24 * HOUR;
/// The fields of a row that are not among the fields in a block.
const OWN: [&str; 4] = ["_id", "instance_id", "create_date", "sampled_at"];
/// Number of blocks that are inserted together.
const BATCH: usize = 200;

/// Writes the samples of VMs as blocks of level 1.
pub(crate) struct BlockWriter {
    blocks: Collection<RawDocumentBuf>,
    encoder: Encoder,
    offset: UtcOffset,
    hour: Option<Hour>,
    waiting: Vec<RawDocumentBuf>,
    /// Number of process rows that were added.
    pub(crate) process_rows: u64,
}

/// The rows of an hour of a VM.
pub(crate) struct Hour {
    instance: InstanceId,
    number: i64,
    pub(crate) vms: Rows,
    pub(crate) processes: Rows,
}

impl BlockWriter {
    pub(crate) fn new(database: &Database, offset: UtcOffset) -> anyhow::Result<Self> {
        Ok(Self {
            blocks: database.collection("blocks"),
            encoder: Encoder::new()?,
            offset,
            hour: None,
            waiting: Vec::new(),
            process_rows: 0,
        })
    }

    /// Adds a sample. All samples of an hour of a VM must be added one after the other.
    pub(crate) async fn add(&mut self, sample: &Sample) -> anyhow::Result<()> {
        let number = Hour::number(sample, self.offset)?;
        if let Some(hour) = &self.hour
            && (hour.number != number || hour.instance != sample.instance_id)
        {
            self.end_hour();
            if self.waiting.len() >= BATCH {
                self.write().await?;
            }
        }
        let hour = self
            .hour
            .get_or_insert_with(|| Hour::new(sample.instance_id.clone(), number, self.offset));
        hour.add(sample, self.offset)?;
        self.process_rows += sample.processes.len() as u64;
        Ok(())
    }

    /// Writes what was added.
    pub(crate) async fn finish(&mut self) -> anyhow::Result<()> {
        self.end_hour();
        self.write().await
    }

    fn end_hour(&mut self) {
        if let Some(hour) = self.hour.take() {
            self.waiting.extend(hour.documents(&mut self.encoder));
        }
    }

    async fn write(&mut self) -> anyhow::Result<()> {
        let waiting = std::mem::take(&mut self.waiting);
        if !waiting.is_empty() {
            let concern = WriteConcern::builder()
                .w(Acknowledgment::Majority)
                .journal(true)
                .build();
            let insert = self.blocks.insert_many(waiting).ordered(false);
            insert.write_concern(concern).await?;
        }
        Ok(())
    }
}

impl Hour {
    /// The number of the hour that contains a sample, counted from 1970.
    fn number(sample: &Sample, offset: UtcOffset) -> anyhow::Result<i64> {
        let moment = sample.create_date.moment(offset)?;
        Ok(i64::try_from(moment.duration_since(std::time::UNIX_EPOCH)?.as_micros())?.div_euclid(HOUR))
    }

    fn new(instance: InstanceId, number: i64, offset: UtcOffset) -> Self {
        let rows = |kind| Rows::new(kind, instance.as_str(), offset.as_millis());
        Self {
            vms: rows(Kind::Vm),
            processes: rows(Kind::Process),
            number,
            instance,
        }
    }

    /// Collects samples of an hour of a VM.
    pub(crate) fn of<'a>(
        samples: impl IntoIterator<Item = &'a Sample>,
        offset: UtcOffset,
    ) -> anyhow::Result<Option<Self>> {
        let mut hour: Option<Self> = None;
        for sample in samples {
            let number = Self::number(sample, offset)?;
            let instance = sample.instance_id.clone();
            hour.get_or_insert_with(|| Self::new(instance, number, offset))
                .add(sample, offset)?;
        }
        Ok(hour)
    }

    /// Adds the rows of a sample, with the fields and types that ingestion stores.
    fn add(&mut self, sample: &Sample, offset: UtcOffset) -> anyhow::Result<()> {
        let documents = Documents::from_sample(sample, offset, sample.create_date.moment(offset)?)?;
        let lists = [
            (&mut self.vms, documents.vms),
            (&mut self.processes, documents.processes),
        ];
        for (rows, documents) in lists {
            for document in documents {
                push(rows, sample.create_date.as_str(), &document)?;
            }
        }
        Ok(())
    }

    /// Encodes the rows as the documents of blocks of level 1.
    pub(crate) fn documents(&self, encoder: &mut Encoder) -> Vec<RawDocumentBuf> {
        let kinds = [("vm", &self.vms), ("process", &self.processes)];
        let mut documents = Vec::new();
        for (kind, rows) in kinds {
            let blocks = encoder.encode(rows);
            let parts = blocks.len();
            let blocks = blocks.into_iter().enumerate();
            documents.extend(blocks.map(|(part, block)| self.document(kind, block, part, parts)));
        }
        documents
    }

    fn document(&self, kind: &str, block: Encoded, part: usize, parts: usize) -> RawDocumentBuf {
        let date = |micros: i64| DateTime::from_millis(micros.div_euclid(1000));
        let number = |count: usize| i32::try_from(count).unwrap_or(i32::MAX);
        let binary = |bytes| Binary {
            subtype: BinarySubtype::Generic,
            bytes,
        };
        // An identifier as long as that of a stored block.
        let mut id = format!("{kind}{:x}{:x}", self.number, part).into_bytes();
        id.extend(self.instance.as_str().bytes().rev());
        id.truncate(20);
        rawdoc! {
            "_id": binary(id),
            "instance_id": self.instance.as_str(),
            "kind": kind,
            "level": 1,
            "hour": date(self.number * HOUR),
            "from": date(block.first),
            "to": date(block.last),
            "rows": number(block.rows),
            "generation": 1_i64,
            "part": number(part),
            "parts": number(parts),
            "expires": date(block.last + KEPT),
            "data": binary(block.bytes),
        }
    }
}

/// Adds a row. Its `_id` is the one that the block computes.
fn push(rows: &mut Rows, create_date: &str, document: &RawDocument) -> anyhow::Result<()> {
    let mut fields = Vec::with_capacity(24);
    for element in document {
        let (key, value) = element?;
        let value = match value {
            _ if OWN.contains(&key.as_str()) => continue,
            RawBsonRef::Null => Value::Null,
            RawBsonRef::Boolean(truth) => Value::Bool(truth),
            RawBsonRef::Int32(number) => Value::Int32(number),
            RawBsonRef::Int64(number) => Value::Int64(number),
            RawBsonRef::Double(number) => Value::Double(number),
            RawBsonRef::String(text) => Value::Text(text),
            other => anyhow::bail!("a row has a field of the type {:?}", other.element_type()),
        };
        fields.push((key.as_str(), value));
    }
    rows.push(create_date, None, None, fields)?;
    Ok(())
}
