//! Properties that must hold for any input. `./dev fuzz` checks them with generated input, and an end-to-end test
//! checks them with the files of the corpus.

use std::{collections::HashMap, time::SystemTime};

use gateway::legacy::{python_repr::rows_to_python, read_request};
use metrics_svc::documents::Documents;
use serde_json::{Value, value::RawValue};
use vmwatch_api::{metrics::Sample, time::UtcOffset};
use vmwatch_blocks::{Block, BlockError, Encoder, Rows, SAMPLE_LIMITS, decode_sample, encode_sample};

/// Checks the request parser of the API of 2017: every request that the gateway forwards to a service is one JSON object
/// whose field `limit` is in the permitted range.
pub fn request(body: &[u8]) {
    let Some(Ok(params)) = read_request(body) else {
        return;
    };
    // Values are not decoded: `serde_json::Value` refuses half of a surrogate pair, which is valid JSON, and which services
    // ignore in fields that they do not know.
    let params: HashMap<String, &RawValue> =
        serde_json::from_slice(&params).expect("the forwarded body is a JSON object");
    let limit = params.get("limit").expect("the request has a limit").get();
    let limit: u64 = limit.parse().expect("the limit is a number");
    assert!((1..=1000).contains(&limit), "{limit}");
}

/// Checks the Python format of rows: an array of rows becomes an array with the same number of ASCII strings.
pub fn python_repr(rows: &[u8]) {
    let Ok(rows) = std::str::from_utf8(rows) else {
        return;
    };
    let Ok(shown) = rows_to_python(rows) else { return };
    assert!(shown.is_ascii(), "{shown}");
    let shown: Vec<String> = serde_json::from_str(&shown).expect("the result is an array of strings");
    let sent: Vec<Value> = serde_json::from_str(rows).expect("the converted rows were an array");
    assert_eq!(shown.len(), sent.len());
    assert!(
        shown.iter().all(|row| row.starts_with('{') && row.ends_with('}')),
        "{shown:?}"
    );
}

/// Checks the parser of agents' messages: an accepted sample is unchanged by encoding and decoding, and becomes one
/// document per row.
pub fn sample(message: &[u8]) {
    let Ok(sample) = serde_json::from_slice::<Sample>(message) else {
        return;
    };
    let encoded = serde_json::to_vec(&sample).expect("the sample can be encoded");
    let again: Sample = serde_json::from_slice(&encoded).expect("the encoded sample can be decoded");
    assert_eq!(
        serde_json::to_vec(&again).expect("the decoded sample can be encoded"),
        encoded
    );
    let offset: UtcOffset = "+08:00".parse().expect("the offset is valid");
    if let Ok(documents) = Documents::from_sample(&sample, offset, SystemTime::now()) {
        // An impossible row is refused alone, unless more than half of the rows are impossible.
        let processes = sample.processes.len() + sample.sums.len();
        assert!(documents.vms.len() <= usize::from(sample.vm.is_some()));
        assert!(documents.processes.len() <= processes);
        assert!(documents.filesystems.len() <= sample.filesystems.len());
        let rows = usize::from(sample.vm.is_some()) + processes + sample.filesystems.len();
        assert!(documents.rows() * 2 >= rows);
    }
}

/// Corrects the checksum of a block or an encoded sample; a wrong one would reject nearly all inputs.
fn sealed(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    if let [a, b, c, d, _, _, _, _, rest @ ..] = bytes.as_slice() {
        let mut crc = crc32fast::Hasher::new();
        crc.update(&[*a, *b, *c, *d]);
        crc.update(rest);
        bytes[4..8].copy_from_slice(&crc.finalize().to_le_bytes());
    }
    bytes
}

/// Checks the decoder of blocks: bytes that are a block have values and ids for all rows, and these rows can be encoded
/// again.
pub fn block(bytes: &[u8]) {
    let read = |bytes: &[u8]| -> Result<(Rows, usize), BlockError> {
        let mut block = Block::open(bytes, SAMPLE_LIMITS)?;
        let ids = block.ids("vm-1")?;
        let sorted = block.sorted(&ids, i64::MIN..i64::MAX);
        assert!(sorted.len() <= block.len());
        let mut rows = Rows::new(block.kind(), "vm-1", 0);
        rows.push_block(&mut block)?;
        Ok((rows, block.len()))
    };
    if let Ok((rows, count)) = read(&sealed(bytes)) {
        let blocks = Encoder::new().expect("there is enough memory").encode(&rows);
        assert!(blocks.iter().map(|block| block.rows).sum::<usize>() <= count);
        for block in blocks {
            let (again, _) = read(&block.bytes).expect("an encoded block can be decoded");
            assert_eq!(again.block_id(), rows.block_id());
        }
    }
}

/// Checks the decoder of encoded samples: an accepted sample can be encoded again, and has at most as many processes.
pub fn encoded_sample(bytes: &[u8]) {
    // The two blocks in the sample have checksums of their own, which are not corrected: cargo-fuzz finds blocks that
    // are hostile themselves by the target `block`.
    let Ok(sample) = decode_sample(&sealed(bytes), SAMPLE_LIMITS) else {
        return;
    };
    let mut encoder = Encoder::new().expect("there is enough memory");
    let bytes = encode_sample(&sample, &mut encoder).expect("the sample can be encoded");
    let again = decode_sample(&bytes, SAMPLE_LIMITS).expect("the encoded sample can be decoded");
    assert!(again.processes.len() <= sample.processes.len());
}
