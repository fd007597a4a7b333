//! What the platform says of the VM. A clone of the VM has another value, although its disk has the same content.

use std::path::{Path, PathBuf};

use vmwatch_api::enrollment::Platform;

use crate::sample::Roots;

/// Values that many VMs have, because something was not set.
const MEANINGLESS: [&str; 4] = [
    "00000000-0000-0000-0000-000000000000",
    "ffffffff-ffff-ffff-ffff-ffffffffffff",
    "00000000000000000000000000000000",
    "iid-datasource-none",
];

/// A source of the identity, best first.
#[derive(Debug, Clone, Copy)]
enum Source {
    /// The UUID that the firmware reports.
    Dmi,
    /// cloud-init's id of the instance.
    CloudInit,
    /// The machine id, which is only as good as the tool that clones VMs: it has to remove the file.
    MachineId,
}

const SOURCES: [Source; 3] = [Source::Dmi, Source::CloudInit, Source::MachineId];

impl Source {
    const fn prefix(self) -> &'static str {
        match self {
            Self::Dmi => "dmi:",
            Self::CloudInit => "cloud-init:",
            Self::MachineId => "machine-id:",
        }
    }

    fn path(self, roots: &Roots) -> PathBuf {
        match self {
            Self::Dmi => roots.sys.join("class/dmi/id/product_uuid"),
            Self::CloudInit => roots.root.join("var/lib/cloud/data/instance-id"),
            Self::MachineId => roots.root.join("etc/machine-id"),
        }
    }

    /// Reads the identity; `None` if the file is missing or unreadable, or if its content identifies nothing.
    fn read(self, roots: &Roots) -> Option<Platform> {
        let text = first_line(&self.path(roots))?.to_ascii_lowercase();
        let digits = text.bytes().filter(u8::is_ascii_hexdigit).count();
        let is_valid = match self {
            Self::Dmi => text.len() == 36 && digits == 32,
            Self::CloudInit => true,
            Self::MachineId => text.len() == 32 && digits == 32,
        };
        if !is_valid || MEANINGLESS.contains(&text.as_str()) {
            return None;
        }
        format!("{}{text}", self.prefix()).parse().ok()
    }
}

/// The first line of a small file.
fn first_line(path: &Path) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    Some(text.lines().next()?.trim().to_owned())
}

/// Reads the identity from the best source that has one.
pub(crate) fn read(roots: &Roots) -> Option<Platform> {
    SOURCES.into_iter().find_map(|source| source.read(roots))
}

/// Returns what the platform says now, if it differs from what it said at the enrolment. A source that is missing now says
/// nothing: it may only have become unreadable.
pub(crate) fn changed(recorded: &Platform, roots: &Roots) -> Option<Platform> {
    let same_source = |source: &Source| recorded.as_str().starts_with(source.prefix());
    let now = SOURCES.into_iter().find(same_source)?.read(roots)?;
    (now != *recorded).then_some(now)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::*;

    /// Files of a VM in a temporary folder.
    pub(crate) struct FakeVm(TempDir);

    impl FakeVm {
        pub(crate) fn new() -> Self {
            let vm = Self(tempfile::tempdir().unwrap());
            for folder in ["sys/class/dmi/id", "var/lib/cloud/data", "etc"] {
                fs::create_dir_all(vm.0.path().join(folder)).unwrap();
            }
            vm
        }

        pub(crate) fn roots(&self) -> Roots {
            Roots {
                proc: self.0.path().join("proc"),
                sys: self.0.path().join("sys"),
                root: self.0.path().to_owned(),
            }
        }

        pub(crate) fn dmi(&self, text: &str) {
            fs::write(self.0.path().join("sys/class/dmi/id/product_uuid"), text).unwrap();
        }

        fn cloud_init(&self, text: &str) {
            fs::write(self.0.path().join("var/lib/cloud/data/instance-id"), text).unwrap();
        }

        fn machine_id(&self, text: &str) {
            fs::write(self.0.path().join("etc/machine-id"), text).unwrap();
        }

        fn read(&self) -> Option<String> {
            read(&self.roots()).map(|platform| platform.as_str().to_owned())
        }
    }

    #[test]
    fn platform_identity_comes_from_the_best_source_that_has_one() {
        let vm = FakeVm::new();
        assert_eq!(vm.read(), None);
        vm.machine_id("uninitialized\n");
        assert_eq!(vm.read(), None);
        vm.machine_id("0123456789abcdef0123456789abcdef\n");
        assert_eq!(
            vm.read().as_deref(),
            Some("machine-id:0123456789abcdef0123456789abcdef")
        );
        vm.cloud_init("iid-datasource-none\n");
        assert!(vm.read().unwrap().starts_with("machine-id:"));
        vm.cloud_init("i-0abc\n");
        assert_eq!(vm.read().as_deref(), Some("cloud-init:i-0abc"));
        for meaningless in ["Not Settable\n", MEANINGLESS[0], MEANINGLESS[1]] {
            vm.dmi(meaningless);
            assert_eq!(vm.read().as_deref(), Some("cloud-init:i-0abc"));
        }
        vm.dmi("6ABF5A1E-B85C-4E5F-BA02-F96E22CBD02E\n");
        assert_eq!(
            vm.read().as_deref(),
            Some("dmi:6abf5a1e-b85c-4e5f-ba02-f96e22cbd02e")
        );
    }

    #[test]
    fn only_another_value_of_the_same_source_is_a_change() {
        let vm = FakeVm::new();
        vm.machine_id("0123456789abcdef0123456789abcdef");
        let machine_id = read(&vm.roots()).unwrap();
        vm.dmi("6abf5a1e-b85c-4e5f-ba02-f96e22cbd02e");
        let dmi = read(&vm.roots()).unwrap();
        assert_eq!(changed(&machine_id, &vm.roots()), None);
        assert_eq!(changed(&dmi, &vm.roots()), None);

        vm.dmi("");
        assert_eq!(changed(&dmi, &vm.roots()), None, "the source says nothing");
        vm.dmi("6abf5a1e-b85c-4e5f-ba02-000000000001");
        let now = changed(&dmi, &vm.roots()).unwrap();
        assert_eq!(now.as_str(), "dmi:6abf5a1e-b85c-4e5f-ba02-000000000001");
        vm.machine_id("00000000000000000000000000000001");
        assert!(changed(&machine_id, &vm.roots()).is_some());
    }
}
