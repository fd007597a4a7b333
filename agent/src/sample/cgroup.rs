//! Finds the systemd unit and the container of a process in its `/proc/<pid>/cgroup`.

/// The systemd unit and the container that a process belongs to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Place {
    /// The innermost unit, such as `nginx.service` or `session-3.scope`.
    pub(super) unit: Option<String>,
    pub(super) container: Option<Container>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Container {
    /// The full id (64 hex digits) of a container of Docker, Podman, containerd or CRI-O.
    Id(String),
    /// The name of an LXC container.
    Named(String),
}

impl Place {
    /// Parses the content of `/proc/<pid>/cgroup`.
    pub(super) fn parse(file: &str) -> Self {
        path(file).map(Self::of_path).unwrap_or_default()
    }

    /// The names of cgroups from the inside out. A unit outside of the container is that of the container's manager.
    fn of_path(path: &str) -> Self {
        let mut place = Self::default();
        let mut names = path.rsplit('/').peekable();
        while let Some(name) = names.next() {
            let parent = names.peek().copied().unwrap_or_default();
            if let Some(container) = container(name, parent) {
                place.container = Some(container);
                break;
            }
            if place.unit.is_none() && is_unit(name) {
                place.unit = Some(name.to_owned());
            }
        }
        place
    }
}

/// The cgroup in systemd's hierarchy of version 1, or else in the hierarchy of version 2. Both exist in hybrid mode.
fn path(file: &str) -> Option<&str> {
    let mut unified = None;
    for line in file.lines() {
        let mut fields = line.splitn(3, ':');
        match (fields.next(), fields.next(), fields.next()) {
            (_, Some("name=systemd"), path) => return path,
            (Some("0"), Some(""), path) => unified = path,
            _ => {}
        }
    }
    unified
}

fn container(name: &str, parent: &str) -> Option<Container> {
    if let Some(lxc) = name.strip_prefix("lxc.payload.") {
        return Some(Container::Named(lxc.to_owned()));
    }
    if matches!(parent, "lxc" | "lxc.payload") && !name.is_empty() {
        return Some(Container::Named(name.to_owned()));
    }
    // Examples: the id alone, `docker-<id>.scope`, `cri-containerd-<id>.scope`, `kubepods-pod7:cri-containerd:<id>`.
    let id = name.strip_suffix(".scope").unwrap_or(name);
    let (runtime, id) = id.rsplit_once(['-', ':']).unwrap_or(("", id));
    let is_id = id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    // The monitor of a container runs outside of it.
    (is_id && !runtime.ends_with("conmon")).then(|| Container::Id(id.to_owned()))
}

fn is_unit(name: &str) -> bool {
    [".service", ".scope", ".socket", ".mount", ".swap"]
        .iter()
        .any(|kind| name.ends_with(kind))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: &str = "8f3b1c2d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f9";

    #[test]
    fn unit_and_container_are_found_in_cgroups_of_all_managers() {
        let id = || Some(Container::Id(ID.to_owned()));
        let lxc = || Some(Container::Named("web".to_owned()));
        for (path, unit, container) in [
            ("/", None, None),
            ("/system.slice", None, None),
            ("/init.scope", Some("init.scope"), None),
            ("/system.slice/nginx.service", Some("nginx.service"), None),
            (
                r"/system.slice/system-getty.slice/getty@tty1.service",
                Some("getty@tty1.service"),
                None,
            ),
            (
                "/user.slice/user-1000.slice/session-3.scope",
                Some("session-3.scope"),
                None,
            ),
            (
                "/user.slice/user-1000.slice/user@1000.service/app.slice/app-x.scope",
                Some("app-x.scope"),
                None,
            ),
            // A service with cgroups of its own.
            (
                "/system.slice/docker.service/supervised",
                Some("docker.service"),
                None,
            ),
            (&format!("/docker/{ID}"), None, id()),
            (&format!("/system.slice/docker-{ID}.scope"), None, id()),
            (&format!("/machine.slice/libpod-{ID}.scope/container"), None, id()),
            (
                &format!("/machine.slice/libpod-conmon-{ID}.scope"),
                Some(&*format!("libpod-conmon-{ID}.scope")),
                None,
            ),
            (
                &format!(
                    "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod7.slice/cri-containerd-{ID}.scope"
                ),
                None,
                id(),
            ),
            (&format!("/kubepods/besteffort/pod7/{ID}"), None, id()),
            (
                &format!("/system.slice/containerd.service/kubepods-pod7.slice:cri-containerd:{ID}"),
                None,
                id(),
            ),
            // systemd runs in the container.
            (
                &format!("/docker/{ID}/system.slice/nginx.service"),
                Some("nginx.service"),
                id(),
            ),
            ("/lxc.payload.web/init.scope", Some("init.scope"), lxc()),
            ("/lxc/web", None, lxc()),
            ("/lxc.monitor.web", None, None),
        ] {
            let unit = unit.map(str::to_owned);
            let expected = Place { unit, container };
            assert_eq!(Place::parse(&format!("0::{path}\n")), expected, "{path}");
            let version_1 =
                format!("12:cpu,cpuacct:/other.service\n1:name=systemd:{path}\n0::/hybrid.service\n");
            assert_eq!(Place::parse(&version_1), expected, "{path}");
        }
        assert_eq!(Place::parse("12:cpu,cpuacct:/other.service\n"), Place::default());
        assert_eq!(Place::parse(""), Place::default());
    }

    proptest! {
        #[test]
        fn parsing_arbitrary_cgroups_does_not_panic(file in "[a-z0-9:/.=\\n-]{0,200}") {
            let _ = Place::parse(&file);
        }
    }
}
