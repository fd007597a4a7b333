//! Any rows are decoded exactly as they were given, and the same rows always make the same bytes.
#![expect(clippy::unwrap_used, reason = "a test may end with a panic")]

use proptest::{collection::vec, option, prelude::*};
use vmwatch_blocks::{Block, BlockError, Encoded, Encoder, Kind, Limits, RowError, RowId, Rows, Value};

const INSTANCE: &str = "6abf5a1e-b85c-4e5f-ba02-f96e22cbd02e";
const OFFSET: i64 = 8 * 3_600_000;
const LIMITS: Limits = Limits {
    rows: 65_536,
    bytes: 64 << 20,
};

/// A row, with texts that it owns.
#[derive(Debug, Clone)]
struct Given {
    date: String,
    lag: Option<i64>,
    id: Option<RowId>,
    fields: Vec<(&'static str, Owned)>,
}

#[derive(Debug, Clone)]
enum Owned {
    Plain(Value<'static>),
    Text(String),
}

impl Owned {
    fn value(&self) -> Value<'_> {
        match self {
            Self::Plain(value) => *value,
            Self::Text(text) => Value::Text(text),
        }
    }
}

fn any_value() -> impl Strategy<Value = Owned> {
    prop_oneof![
        4 => (0_i32..5000).prop_map(|tenths| Owned::Plain(Value::Double(f64::from(tenths) / 10.0))),
        1 => any::<u64>().prop_map(|bits| Owned::Plain(Value::Double(f64::from_bits(bits)))),
        1 => any::<i32>().prop_map(|number| Owned::Plain(Value::Int32(number))),
        1 => any::<i64>().prop_map(|number| Owned::Plain(Value::Int64(number))),
        1 => any::<bool>().prop_map(|truth| Owned::Plain(Value::Bool(truth))),
        1 => Just(Owned::Plain(Value::Null)),
        1 => Just(Owned::Plain(Value::Missing)),
        1 => "\\PC{0,8}".prop_map(Owned::Text),
    ]
}

fn any_row() -> impl Strategy<Value = Given> {
    let measure = || prop_oneof![3 => Just(Owned::Plain(Value::Double(0.0))), 1 => any_value()];
    let date = (0_u32..4, prop_oneof![Just(""), Just(".000000"), Just(".250001")]);
    let fields = (
        (0_i32..4, any::<bool>()),
        (0_u8..3),
        measure(),
        measure(),
        option::of(any_value()),
        "[a-c]{0,2}",
    );
    (
        date,
        option::of(-5000_i64..90_000_000),
        option::weighted(0.1, any::<RowId>()),
        fields,
    )
        .prop_map(
            |((minute, fraction), lag, id, ((pid, long), started, cpu, net, extra, name))| {
                let pid = if long {
                    Value::Int64(pid.into())
                } else {
                    Value::Int32(pid)
                };
                let mut fields = vec![
                    ("net_incoming", net),
                    ("pid", Owned::Plain(pid)),
                    (
                        "running_time",
                        Owned::Plain(Value::Double(f64::from(started) + 0.5)),
                    ),
                    ("cpu_util", cpu),
                    ("cmd", Owned::Text(name)),
                ];
                fields.extend(extra.map(|value| ("extra", value)));
                Given {
                    date: format!("2017-01-01T21:0{minute}:00{fraction}"),
                    lag,
                    id,
                    fields,
                }
            },
        )
}

fn unix_micros(date: &str) -> i64 {
    let offset: vmwatch_api::time::UtcOffset = "+08:00".parse().unwrap();
    offset.unix_micros_of(date).unwrap().cast_signed()
}

fn collect<'a>(given: impl IntoIterator<Item = &'a Given>) -> Rows {
    let mut rows = Rows::new(Kind::Process, INSTANCE, OFFSET);
    for row in given {
        let arrival = row.lag.map(|lag| unix_micros(&row.date) - lag);
        let fields = row.fields.iter().map(|(name, value)| (*name, value.value()));
        rows.push(&row.date, arrival, row.id, fields).unwrap();
    }
    rows
}

fn encode(rows: &Rows) -> Vec<Encoded> {
    Encoder::new().unwrap().encode(rows)
}

/// A value as a text that differs for different types and bits.
fn exact(value: Value<'_>) -> String {
    match value {
        Value::Double(number) => format!("double {:x}", number.to_bits()),
        other => format!("{other:?}"),
    }
}

/// A row with its `_id`, `create_date`, effective date and values.
type Decoded = (RowId, String, i64, Vec<String>);

/// Decodes all rows, in the order of answers.
fn decode(bytes: &[u8]) -> Result<Vec<Decoded>, BlockError> {
    let mut block = Block::open(bytes, LIMITS)?;
    let ids = block.ids(INSTANCE)?;
    let names = ["net_incoming", "pid", "running_time", "cpu_util", "cmd", "extra"];
    let columns = names.map(|name| block.column(name));
    let columns = columns.into_iter().collect::<Result<Vec<_>, _>>()?;
    let order = block.sorted(&ids, i64::MIN..i64::MAX);
    Ok(order
        .into_iter()
        .map(|row| {
            let values = columns.iter().map(|column| exact(column.get(row)));
            (
                ids.get(row),
                block.create_date(row),
                block.effective(row),
                values.collect(),
            )
        })
        .collect())
}

/// The result that [`decode`] should return for a block of these rows.
fn expected(given: &[Given]) -> Vec<Decoded> {
    let ids = collect(given).ids();
    let mut rows: Vec<_> = given
        .iter()
        .zip(ids)
        .map(|(row, id)| {
            let field = |name: &str| {
                let field = row.fields.iter().find(|(field, _)| *field == name);
                exact(field.map_or(Value::Missing, |(_, value)| value.value()))
            };
            let names = ["net_incoming", "pid", "running_time", "cpu_util", "cmd", "extra"];
            let effective = unix_micros(&row.date) - row.lag.unwrap_or(0).max(0);
            (id, row.date.clone(), effective, names.map(field).to_vec())
        })
        .collect();
    rows.sort_by(|a, b| (a.2, &a.1, a.0).cmp(&(b.2, &b.1, b.0)));
    rows
}

/// The rows without those that have the `_id` of an earlier one.
fn distinct(mut given: Vec<Given>) -> Vec<Given> {
    let mut seen = std::collections::HashSet::new();
    let mut ids = collect(&given).ids().into_iter();
    given.retain(|_| seen.insert(ids.next().unwrap()));
    given
}

proptest! {
    #[test]
    fn rows_are_decoded_exactly_and_in_the_order_of_answers(given in vec(any_row(), 1..60)) {
        let given = distinct(given);
        let blocks = encode(&collect(&given));
        prop_assert_eq!(blocks.len(), 1);
        let decoded = decode(&blocks[0].bytes).unwrap();
        let first_and_last = (decoded[0].2, decoded.last().unwrap().2);
        prop_assert_eq!((blocks[0].first, blocks[0].last), first_and_last);
        prop_assert_eq!(decoded, expected(&given));
    }

    #[test]
    fn same_rows_in_any_order_and_any_blocks_make_the_same_bytes(
        given in vec(any_row(), 1..40).prop_flat_map(|rows| (Just(rows.clone()), Just(rows).prop_shuffle())),
        cut in 0_usize..40, again in 0_usize..40,
    ) {
        let (given, shuffled) = given;
        let bytes = encode(&collect(&given));
        prop_assert_eq!(collect(&given).block_id(), collect(&shuffled).block_id());
        prop_assert_eq!(&encode(&collect(&shuffled)), &bytes);
        // The rows come in two blocks, and some of them in both.
        let mut merged = Rows::new(Kind::Process, INSTANCE, OFFSET);
        for part in [&shuffled[..cut.min(shuffled.len())], &shuffled[cut.min(again).min(shuffled.len())..]] {
            for block in encode(&collect(part)) {
                merged.push_block(&mut Block::open(&block.bytes, LIMITS).unwrap()).unwrap();
            }
        }
        prop_assert_eq!(&encode(&merged), &bytes);
        // The rows of ranges of places make the same block again.
        let mut whole = Block::open(&bytes[0].bytes, LIMITS).unwrap();
        let place = whole.ids(INSTANCE).unwrap().place(cut % whole.len());
        let (mut lower, mut upper) = (collect(&[]), collect(&[]));
        lower.push_block_within(&mut whole, ..place).unwrap();
        upper.push_block_within(&mut whole, place..).unwrap();
        prop_assert_eq!(lower.len() + upper.len(), whole.len());
        let mut joined = collect(&[]);
        for block in encode(&upper).iter().chain(&encode(&lower)) {
            joined.push_block(&mut Block::open(&block.bytes, LIMITS).unwrap()).unwrap();
        }
        prop_assert_eq!(&encode(&joined), &bytes);
    }

    #[test]
    fn damaged_blocks_are_rejected_and_resealed_ones_never_panic(
        given in vec(any_row(), 1..30), at in any::<prop::sample::Index>(), bit in 0_u8..8, cut in any::<bool>(),
    ) {
        let mut bytes = encode(&collect(&given)).remove(0).bytes;
        let at = at.index(bytes.len());
        if cut {
            bytes.truncate(at);
        } else {
            bytes[at] ^= 1_u8 << bit;
        }
        prop_assert!(decode(&bytes).is_err());
        if bytes.len() >= 8 {
            let mut crc = crc32fast::Hasher::new();
            crc.update(&bytes[..4]);
            crc.update(&bytes[8..]);
            bytes[4..8].copy_from_slice(&crc.finalize().to_le_bytes());
            let _ = decode(&bytes);
        }
    }

    #[test]
    fn any_bytes_give_rows_or_an_error(body in vec(any::<u8>(), 0..200)) {
        let mut bytes = b"VMB\x01\0\0\0\0".to_vec();
        bytes.extend(body);
        let mut crc = crc32fast::Hasher::new();
        crc.update(&bytes[..4]);
        crc.update(&bytes[8..]);
        bytes[4..8].copy_from_slice(&crc.finalize().to_le_bytes());
        let _ = decode(&bytes);
    }
}

fn process(pid: i32, name: &'static str) -> Vec<(&'static str, Value<'static>)> {
    vec![
        ("pid", Value::Int32(pid)),
        ("running_time", Value::Double(1.5)),
        ("cmd", Value::Text(name)),
    ]
}

fn many(count: i32) -> Rows {
    let mut rows = Rows::new(Kind::Process, INSTANCE, OFFSET);
    for row in 0..count {
        let date = format!("2017-01-01T21:{:02}:{:02}", row / 60 % 60, row % 60);
        rows.push(&date, None, None, process(row / 3600, "x")).unwrap();
    }
    rows
}

#[test]
fn blocks_of_more_rows_are_split_between_processes() {
    let blocks = encode(&many(70_000));
    assert_eq!(
        blocks.iter().map(|block| block.rows).collect::<Vec<_>>(),
        [64_800, 5200]
    );
    assert_eq!(decode(&blocks[1].bytes).unwrap().len(), 5200);
}

#[test]
fn of_rows_with_the_same_id_the_first_to_arrive_is_kept() {
    let date = "2017-01-01T21:37:59";
    let now = unix_micros(date);
    let mut rows = Rows::new(Kind::Process, INSTANCE, OFFSET);
    for (arrival, name) in [(now - 1, "second"), (now - 2, "first"), (now + 9, "third")] {
        rows.push(date, Some(arrival), None, process(1, name)).unwrap();
    }
    let decoded = decode(&encode(&rows)[0].bytes).unwrap();
    assert_eq!(decoded.len(), 1);
    assert_eq!(
        (decoded[0].2, decoded[0].3[4].as_str()),
        (now - 2, "Text(\"first\")")
    );
}

#[test]
fn computed_ids_take_no_space_and_others_are_kept() {
    let date = "2017-01-01T21:37:59.001065";
    let size = |id: fn(RowId) -> Option<RowId>| {
        let computed = {
            let mut rows = Rows::new(Kind::Vm, "vm-1", OFFSET);
            rows.push(date, None, None, [("mem", Value::Double(8.6))])
                .unwrap();
            rows.id(0)
        };
        let mut rows = Rows::new(Kind::Vm, "vm-1", OFFSET);
        rows.push(date, None, id(computed), [("mem", Value::Double(8.6))])
            .unwrap();
        let bytes = encode(&rows).remove(0).bytes;
        let mut block = Block::open(&bytes, LIMITS).unwrap();
        let expected = id(computed).unwrap_or(computed);
        assert_eq!(block.ids("vm-1").unwrap().get(0), expected);
        bytes.len()
    };
    assert_eq!(size(|_| None), size(Some));
    assert!(size(|_| Some([7; 12])) > size(|_| None));
}

/// Rows of three filesystems, one sample per minute. One of them is written to, one grows at times, and one never changes.
fn filesystems(minutes: i64) -> Rows {
    let mut rows = Rows::new(Kind::Filesystem, INSTANCE, OFFSET);
    for minute in 0..minutes {
        let date = format!("2017-01-01T21:{minute:02}:00.{:06}", minute * 7919 % 1500);
        let written = (minute * minute * 7919 % 65_536) * 4096;
        for (mount_point, kind, used) in [
            ("/", "ext4", 5_368_709_120 + written),
            ("/home", "ext4", 1_073_741_824 + minute / 10 * 262_144),
            ("/boot/efi", "vfat", 6_291_456),
        ] {
            let fields = [
                ("mount_point", Value::Text(mount_point)),
                ("filesystem", Value::Text(kind)),
                ("used_bytes", Value::Int64(used)),
                ("total_bytes", Value::Int64(42_949_672_960)),
            ];
            rows.push(&date, None, None, fields).unwrap();
        }
    }
    rows
}

#[test]
fn rows_of_filesystems_take_few_bytes_and_are_grouped_by_mount_point() {
    let rows = filesystems(60);
    let bytes = encode(&rows).remove(0).bytes;
    let sample = encode(&filesystems(1)).remove(0).bytes;
    println!(
        "an hour of 180 rows takes {} bytes, a sample of 3 rows {}",
        bytes.len(),
        sample.len()
    );
    assert!(bytes.len() <= 3 * rows.len(), "{} bytes", bytes.len());
    let mut block = Block::open(&bytes, LIMITS).unwrap();
    assert_eq!(block.kind(), Kind::Filesystem);
    let mount_points = block.column("mount_point").unwrap();
    let found: Vec<String> = (0..180)
        .map(|row| format!("{:?}", mount_points.get(row)))
        .collect();
    assert_eq!(found.chunk_by(|one, other| one == other).count(), 3);
    let ids = block.ids(INSTANCE).unwrap();
    let mut found: Vec<RowId> = (0..180).map(|row| ids.get(row)).collect();
    let mut expected = rows.ids();
    found.sort_unstable();
    expected.sort_unstable();
    assert_eq!(found, expected);
    // A row without a mount point is refused.
    let mut rows = filesystems(1);
    let refused = rows.push(
        "2017-01-01T21:00:00",
        None,
        None,
        [("used_bytes", Value::Int64(1))],
    );
    assert_eq!((refused, rows.len()), (Err(RowError::MountPoint), 3));
}

#[test]
fn rows_of_hypervisors_keep_missing_values_and_have_ids_of_their_own() {
    let mut rows = Rows::new(Kind::Hypervisor, "vm-1", OFFSET);
    let mut of_agent = Rows::new(Kind::Vm, "vm-1", OFFSET);
    for (second, cpu) in [(0, Value::Missing), (10, Value::Double(1.5))] {
        let date = format!("2017-01-01T21:37:{second:02}.001065");
        let fields = [("cpu_util", cpu), ("hypervisor", Value::Text("lab"))];
        rows.push(&date, None, None, fields).unwrap();
        of_agent.push(&date, None, None, fields).unwrap();
    }
    let bytes = encode(&rows).remove(0).bytes;
    let mut block = Block::open(&bytes, LIMITS).unwrap();
    assert_eq!((block.kind(), block.len()), (Kind::Hypervisor, 2));
    let cpu = block.column("cpu_util").unwrap();
    assert_eq!((cpu.get(0), cpu.get(1)), (Value::Missing, Value::Double(1.5)));
    assert_eq!(block.column("hypervisor").unwrap().get(1), Value::Text("lab"));
    let ids = block.ids("vm-1").unwrap();
    assert_eq!([ids.get(0), ids.get(1)], *rows.ids());
    assert!(rows.ids().iter().all(|id| !of_agent.ids().contains(id)));
    assert!(of_agent.push_block(&mut block).is_err(), "kinds are not mixed");
}

#[test]
fn rows_that_no_block_can_hold_are_rejected_and_change_nothing() {
    let mut rows = many(2);
    let before = encode(&rows);
    let date = "2017-01-01T22:00:00";
    let long = "x".repeat(5000);
    let names: Vec<String> = (0..64).map(|number| format!("field {number}")).collect();
    let mut too_many = process(1, "x");
    too_many.extend(
        names
            .iter()
            .map(|name| (name.as_str(), Value::Null))
            .map(|(name, value)| {
                let name: &'static str = Box::leak(name.to_owned().into_boxed_str());
                (name, value)
            }),
    );
    let twice = vec![
        ("pid", Value::Int32(1)),
        ("mem", Value::Null),
        ("mem", Value::Null),
    ];
    for (date, fields, error) in [
        ("2017-1-01T22:00:00", process(1, "x"), RowError::Date),
        (date, process(-1, "x"), RowError::Pid),
        (date, vec![("cmd", Value::Text("no pid"))], RowError::Pid),
        (date, twice, RowError::Field),
        (date, vec![("", Value::Null)], RowError::Field),
        (date, vec![("\nlag", Value::Int64(1))], RowError::Field),
    ] {
        assert_eq!(rows.push(date, None, None, fields), Err(error));
    }
    assert_eq!(rows.push(date, None, None, too_many), Err(RowError::Field));
    let fields = [("pid", Value::Int32(1)), ("cmd", Value::Text(&long))];
    assert_eq!(rows.push(date, None, None, fields), Err(RowError::Text));
    assert_eq!(encode(&rows), before);
}

#[test]
fn limits_are_checked_before_decoding() {
    let bytes = encode(&many(10_000)).remove(0).bytes;
    let open = |rows, bytes_limit| {
        let limits = Limits {
            rows,
            bytes: bytes_limit,
        };
        Block::open(&bytes, limits).map(|block| block.len())
    };
    assert_eq!(open(10_000, 1 << 20), Ok(10_000));
    assert_eq!(open(9999, 1 << 20), Err(BlockError::TooLarge));
    assert_eq!(open(10_000, 50_000), Err(BlockError::TooLarge));
}

#[test]
fn newer_version_is_an_error_of_its_own() {
    let mut bytes = encode(&many(1)).remove(0).bytes;
    bytes[3] = 2;
    let mut crc = crc32fast::Hasher::new();
    crc.update(&bytes[..4]);
    crc.update(&bytes[8..]);
    bytes[4..8].copy_from_slice(&crc.finalize().to_le_bytes());
    assert_eq!(
        Block::open(&bytes, LIMITS).unwrap_err(),
        BlockError::NewerVersion(2)
    );
}

#[test]
fn some_columns_and_a_range_of_time_can_be_decoded_alone() {
    let rows = many(7200);
    let bytes = encode(&rows).remove(0).bytes;
    let mut block = Block::open(&bytes, LIMITS).unwrap();
    let pids = block.column("pid").unwrap();
    let start = unix_micros("2017-01-01T21:10:00");
    let within = block.rows_within(start..start + 60_000_000);
    assert_eq!(within.len(), 120);
    assert!(
        within
            .iter()
            .all(|row| block.create_date(*row).starts_with("2017-01-01T21:10:"))
    );
    let values: Vec<_> = [0, 60].map(|at| pids.get(within[at])).to_vec();
    assert_eq!(values, [Value::Int32(0), Value::Int32(1)]);
    assert_eq!(block.column("no such field").unwrap().get(0), Value::Missing);
}
