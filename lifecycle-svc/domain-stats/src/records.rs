//! The call to libvirt. All unsafe code of vmwatch is in this file.

#![expect(
    unsafe_code,
    reason = "libvirt is a C library; each block states why it is sound"
)]

use std::{ffi::CStr, ptr, slice};

use virt::{connect::Connect, error::Error};
use virt_sys::{self as sys, virDomainStatsRecord, virDomainStatsRecordPtr, virTypedParameter};

use crate::{domain::DomainStats, parameters::Value};

/// The groups of parameters that are requested. A driver leaves out groups that it does not have.
const GROUPS: u32 = sys::VIR_DOMAIN_STATS_STATE
    | sys::VIR_DOMAIN_STATS_CPU_TOTAL
    | sys::VIR_DOMAIN_STATS_BALLOON
    | sys::VIR_DOMAIN_STATS_VCPU
    | sys::VIR_DOMAIN_STATS_INTERFACE
    | sys::VIR_DOMAIN_STATS_BLOCK;
/// Only active domains have counters. libvirt does not wait for a domain that is busy, and leaves out what it would
/// have to ask its hypervisor process for.
const FLAGS: u32 =
    sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE | sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT;

/// Reads the counters of the active domains, of at most `most`. Blocks until the hypervisor answers.
pub fn read(connect: &Connect, most: usize) -> Result<Vec<DomainStats>, Error> {
    let mut list: *mut virDomainStatsRecordPtr = ptr::null_mut();
    // SAFETY: `connect` is an open connection during the whole call. `list` is a variable in which libvirt may store the
    // address of a list, and nothing else refers to it.
    let count = unsafe { sys::virConnectGetAllDomainStats(connect.as_ptr(), GROUPS, &raw mut list, FLAGS) };
    let Ok(count) = usize::try_from(count) else {
        return Err(Error::last_error());
    };
    let records = Records { list, count };
    Ok(records.iter().take(most).filter_map(stats).collect())
}

/// The list of records that libvirt has returned. Dropping it frees the list and its records.
struct Records {
    list: *mut virDomainStatsRecordPtr,
    count: usize,
}

impl Records {
    /// The records, which live as long as the list.
    fn iter(&self) -> impl Iterator<Item = &virDomainStatsRecord> {
        let pointers: &[virDomainStatsRecordPtr] = if self.list.is_null() {
            &[]
        } else {
            // SAFETY: libvirt has stored `count` pointers from `list` on. They are only changed by `drop`, which the
            // borrow of `self` excludes.
            unsafe { slice::from_raw_parts(self.list, self.count) }
        };
        // SAFETY: each of the pointers is null or refers to a record that belongs to the list and is freed with it.
        pointers.iter().filter_map(|record| unsafe { record.as_ref() })
    }
}

impl Drop for Records {
    fn drop(&mut self) {
        // SAFETY: `list` is null, which the function permits, or the list that libvirt returned to this process. It is freed
        // only here, and nothing borrows from it any more.
        unsafe { sys::virDomainStatsRecordListFree(self.list) };
    }
}

/// Copies the counters of a domain out of its record.
fn stats(record: &virDomainStatsRecord) -> Option<DomainStats> {
    let mut uuid = [0; sys::VIR_UUID_BUFLEN as usize];
    // SAFETY: the domain belongs to the record, and the array has the length that libvirt requires.
    let read = unsafe { sys::virDomainGetUUID(record.dom, uuid.as_mut_ptr()) };
    if read != 0 {
        return None;
    }
    // SAFETY: the domain belongs to the record.
    let run = unsafe { sys::virDomainGetID(record.dom) };
    let mut stats = DomainStats {
        uuid,
        // libvirt returns -1 as an unsigned number if the domain has stopped.
        run: (run != u32::MAX).then_some(run),
        ..DomainStats::default()
    };
    for parameter in parameters(record) {
        let name = parameter.field.map(|char| u8::from_ne_bytes(char.to_ne_bytes()));
        let name = CStr::from_bytes_until_nul(&name)
            .ok()
            .and_then(|name| name.to_str().ok());
        if let (Some(name), Some(value)) = (name, value(parameter)) {
            stats.set(name, value);
        }
    }
    Some(stats)
}

/// The parameters of a record.
fn parameters(record: &virDomainStatsRecord) -> &[virTypedParameter] {
    match usize::try_from(record.nparams) {
        // SAFETY: libvirt has stored this number of parameters from `params` on. They belong to the record, so they are
        // not changed or freed while it is borrowed.
        Ok(count) if !record.params.is_null() => unsafe { slice::from_raw_parts(record.params, count) },
        _ => &[],
    }
}

/// The value of a parameter; `None` for a negative number and for types that no counter has.
fn value(parameter: &virTypedParameter) -> Option<Value<'_>> {
    let kind = u32::try_from(parameter.type_).ok()?;
    // SAFETY: the type states which member of the union libvirt has stored. A text is null or ends with a NUL, and
    // belongs to the record, from which it is borrowed.
    unsafe {
        match kind {
            sys::VIR_TYPED_PARAM_INT => u64::try_from(parameter.value.i).ok().map(Value::Number),
            sys::VIR_TYPED_PARAM_UINT => Some(Value::Number(parameter.value.ui.into())),
            sys::VIR_TYPED_PARAM_LLONG => u64::try_from(parameter.value.l).ok().map(Value::Number),
            sys::VIR_TYPED_PARAM_ULLONG => Some(Value::Number(parameter.value.ul)),
            sys::VIR_TYPED_PARAM_STRING if !parameter.value.s.is_null() => {
                CStr::from_ptr(parameter.value.s).to_str().ok().map(Value::Text)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use virt::domain::Domain;

    use super::*;

    /// The UUID of the VM that libvirt's test driver always has.
    const TEST_VM: [u8; 16] = [
        0x66, 0x95, 0xeb, 0x01, 0xf6, 0xa4, 0x83, 0x04, 0x79, 0xaa, 0x97, 0xf2, 0x50, 0x2e, 0x19, 0x3f,
    ];

    fn open() -> Connect {
        Connect::open(Some("test:///default")).unwrap()
    }

    /// libvirt's test driver reports only the state of a domain.
    #[test]
    fn active_domains_of_test_driver_are_read() {
        let connect = open();
        let found = read(&connect, 10).unwrap();
        let expected = DomainStats {
            uuid: TEST_VM,
            run: Some(1),
            state: Some(1),
            ..DomainStats::default()
        };
        assert_eq!(found, [expected]);
        assert_eq!(read(&connect, 0).unwrap(), []);

        let domain = Domain::lookup_by_id(&connect, 1).unwrap();
        domain.destroy().unwrap();
        assert_eq!(read(&connect, 10).unwrap(), []);
        domain.create().unwrap();
        let restarted = read(&connect, 10).unwrap();
        assert_eq!(restarted[0].run, Some(2));
    }

    /// Resident memory of this process in bytes.
    fn resident() -> usize {
        let pages = fs::read_to_string("/proc/self/statm").unwrap();
        pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    }

    /// Each list takes more than 300 bytes, so that 50,000 lists that are not freed take more than 15 MB.
    #[test]
    fn memory_of_lists_is_freed() {
        let connect = open();
        let read = || assert_eq!(read(&connect, 10).unwrap().len(), 1);
        (0..1000).for_each(|_| read());
        let before = resident();
        (0..50_000).for_each(|_| read());
        let grown = resident().saturating_sub(before);
        assert!(grown < 4 << 20, "{grown} bytes");
    }

    fn parameter(kind: u32, value: sys::_virTypedParameterValue) -> virTypedParameter {
        virTypedParameter {
            field: [0; 80],
            type_: kind.try_into().unwrap(),
            value,
        }
    }

    #[test]
    fn parameter_value_is_read_by_its_type() {
        let number = |kind, value| match self::value(&parameter(kind, value)) {
            Some(Value::Number(number)) => Some(number),
            other => {
                assert!(other.is_none(), "{other:?}");
                None
            }
        };
        let empty = || sys::_virTypedParameterValue { ul: 0 };
        let value = |set: fn(&mut sys::_virTypedParameterValue)| {
            let mut value = empty();
            set(&mut value);
            value
        };
        assert_eq!(number(sys::VIR_TYPED_PARAM_INT, value(|v| v.i = 7)), Some(7));
        assert_eq!(number(sys::VIR_TYPED_PARAM_INT, value(|v| v.i = -7)), None);
        assert_eq!(
            number(sys::VIR_TYPED_PARAM_UINT, value(|v| v.ui = u32::MAX)),
            Some(u32::MAX.into())
        );
        assert_eq!(number(sys::VIR_TYPED_PARAM_LLONG, value(|v| v.l = -1)), None);
        assert_eq!(
            number(sys::VIR_TYPED_PARAM_ULLONG, value(|v| v.ul = u64::MAX)),
            Some(u64::MAX)
        );
        assert_eq!(number(sys::VIR_TYPED_PARAM_DOUBLE, value(|v| v.d = 1.0)), None);
        assert_eq!(number(99, empty()), None);
        // A text that is null.
        assert_eq!(number(sys::VIR_TYPED_PARAM_STRING, empty()), None);
        let text = c"vda".to_owned();
        let named = sys::_virTypedParameterValue {
            s: text.as_ptr().cast_mut(),
        };
        let named = parameter(sys::VIR_TYPED_PARAM_STRING, named);
        assert!(matches!(self::value(&named), Some(Value::Text("vda"))));
    }
}
