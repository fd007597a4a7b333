#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::python_repr(data));
