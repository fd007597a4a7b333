//! A real hypervisor for tests: libvirtd in session mode, with a QEMU guest that runs the agent.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::Command,
};

use rustix::{
    fs::{CWD, FileType, Mode, makedev, mknodat},
    process::{Pid, Signal, kill_process},
};
use tempfile::TempDir;

use crate::{PATIENCE, Process, Spec, eventually, free_port, tools};

/// User id of `nobody` on Debian. QEMU needs no further permissions, and libvirtd in session mode must not run as root.
pub const NOBODY: u32 = 65_534;

/// A libvirtd in session mode with its own folder. Dropping it ends libvirtd and its guests.
#[derive(Debug)]
pub struct Libvirtd {
    /// The process of libvirtd.
    pub process: Process,
    folder: TempDir,
    port: Option<u16>,
}

/// What a libvirtd of a test can do besides running VMs of QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ability {
    None,
    /// It listens on a TCP port without authentication.
    Tcp,
    /// It opens taps that belong to its user. This needs root.
    Taps,
}

impl Libvirtd {
    /// Starts libvirtd and waits until it answers.
    pub async fn start() -> Self {
        Self::start_able(Ability::None).await
    }

    /// Starts a libvirtd that also listens on a TCP port, see [`Libvirtd::address`].
    pub async fn start_with_tcp() -> Self {
        Self::start_able(Ability::Tcp).await
    }

    /// Starts a libvirtd whose VMs can use taps that the test has created for [`NOBODY`]. The test must run as root.
    pub async fn start_with_taps() -> Self {
        Self::start_able(Ability::Taps).await
    }

    async fn start_able(ability: Ability) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("vmwatch-libvirt-")
            .tempdir()
            .unwrap();
        let root = folder.path().to_owned();
        fs::set_permissions(&root, fs::Permissions::from_mode(0o711)).unwrap();
        for name in ["home", "home/.config", "home/.config/libvirt", "run", "image"] {
            fs::create_dir(root.join(name)).unwrap();
        }
        // The guests run without an AppArmor profile and without virtlogd, because only the system's libvirtd provides
        // these.
        let conf = "security_driver = \"none\"\nstdio_handler = \"file\"\n";
        fs::write(root.join("home/.config/libvirt/qemu.conf"), conf).unwrap();
        let port = (ability == Ability::Tcp).then(free_port);
        if let Some(port) = port {
            let conf = format!(
                "listen_tls = 0\nlisten_tcp = 1\nlisten_addr = \"127.0.0.1\"\ntcp_port = \"{port}\"\nauth_tcp = \"none\"\n"
            );
            fs::write(root.join("home/.config/libvirt/libvirtd.conf"), conf).unwrap();
        }
        for part in ["vmlinuz", "initramfs.gz"] {
            fs::copy(tools::guest_image().join(part), root.join("image").join(part)).unwrap();
        }
        let as_root = rustix::process::getuid().is_root();
        if as_root {
            for name in ["home", "home/.config", "home/.config/libvirt", "run"] {
                chown(root.join(name), Some(NOBODY), Some(NOBODY)).unwrap();
            }
        }
        let mut spec = spec(&root, as_root);
        if port.is_some() {
            spec.args.push("--listen".to_owned());
        }
        if ability == Ability::Taps {
            spec = with_tun_device(spec, &root);
        }
        let process = Process::start(spec);
        let this = Self {
            process,
            folder,
            port,
        };
        eventually("libvirtd answers", PATIENCE, async || this.try_virsh(&["list"])).await;
        this
    }

    /// The connection URI for the `libvirt` driver.
    pub fn uri(&self) -> String {
        let socket = self.folder.path().join("run/libvirt/libvirt-sock");
        format!("qemu+unix:///session?socket={}", socket.display())
    }

    /// The address of the TCP port of a libvirtd from [`Libvirtd::start_with_tcp`].
    pub fn address(&self) -> String {
        let port = self.port.expect("this libvirtd listens on a TCP port");
        format!("127.0.0.1:{port}")
    }

    /// A folder whose files libvirtd can read.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Creates a disk image that VMs can write to.
    pub fn disk(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.folder.path().join(name);
        let file = fs::File::create(&path).unwrap();
        file.set_len(bytes).unwrap();
        file.set_permissions(fs::Permissions::from_mode(0o666)).unwrap();
        path
    }

    /// Defines a VM, which is switched off.
    pub fn define(&self, uuid: &str, domain: &str) {
        let file = self.folder.path().join(format!("{uuid}.xml"));
        fs::write(&file, domain).unwrap();
        self.virsh(&["define", &file.display().to_string()]);
    }

    /// The home folder of libvirtd and its guests, which they can read.
    pub fn home(&self) -> PathBuf {
        self.folder.path().join("home")
    }

    /// Runs `virsh` and returns its output; panics if the command fails.
    pub fn virsh(&self, args: &[&str]) -> String {
        self.try_virsh(args)
            .unwrap_or_else(|error| panic!("virsh {args:?}: {error}"))
    }

    fn try_virsh(&self, args: &[&str]) -> Result<String, String> {
        let output = Command::new("virsh")
            .args(["--quiet", "--connect", &self.uri()])
            .args(args)
            .output()
            .map_err(|error| format!("cannot run virsh: {error}; run `./dev install`"))?;
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
        }
    }

    /// Defines a guest that is switched off. The guest's agent gets these settings. Their names are given without the
    /// prefix `VMWATCH_`.
    pub fn define_guest(&self, uuid: &str, settings: &[(&str, &str)]) {
        self.define(uuid, &self.guest(uuid, settings));
    }

    /// The XML of a guest for [`Libvirtd::define_guest`].
    pub fn guest(&self, uuid: &str, settings: &[(&str, &str)]) -> String {
        let settings: Vec<_> = settings
            .iter()
            .map(|(name, value)| format!("vmwatch.{name}={value}"))
            .collect();
        let template = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/guest/domain.xml");
        fs::read_to_string(template)
            .unwrap()
            .replace("{name}", &format!("guest-{uuid}"))
            .replace("{uuid}", uuid)
            .replace("{image}", &self.image().display().to_string())
            .replace("{settings}", &settings.join(" "))
            .replace("{console}", &self.console_file(uuid).display().to_string())
    }

    /// The folder with the kernel and the initramfs of guests.
    pub fn image(&self) -> PathBuf {
        self.folder.path().join("image")
    }

    /// The guest's console output so far.
    pub fn console(&self, uuid: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.console_file(uuid)).unwrap_or_default()).into_owned()
    }

    fn console_file(&self, uuid: &str) -> PathBuf {
        self.folder.path().join("home").join(format!("{uuid}.console"))
    }
}

/// QEMU keeps running after libvirtd ends. That is desired in production, but tests must end it.
impl Drop for Libvirtd {
    fn drop(&mut self) {
        self.process.kill9();
        let pid_files = fs::read_dir(self.folder.path().join("run/libvirt/qemu/run"));
        for file in pid_files.into_iter().flatten().flatten() {
            let pid = fs::read_to_string(file.path())
                .ok()
                .and_then(|text| text.trim().parse().ok());
            if let Some(pid) = pid.filter(|pid| self.is_ours(*pid)).and_then(Pid::from_raw) {
                // Killing fails only if the process has already ended.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

impl Libvirtd {
    /// Whether the process is a guest of this test and not another process that reuses the pid.
    fn is_ours(&self, pid: i32) -> bool {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&command).contains(&*self.folder.path().to_string_lossy())
    }
}

fn spec(root: &Path, as_root: bool) -> Spec {
    let path = |name: &str| root.join(name).display().to_string();
    let mut args: Vec<String> = Vec::new();
    let mut program = PathBuf::from("libvirtd");
    if as_root {
        program = PathBuf::from("setpriv");
        let user = NOBODY.to_string();
        // The parent-death signal is set again, because a change of the user clears it.
        let become_nobody = [
            "--reuid",
            &user,
            "--regid",
            &user,
            "--clear-groups",
            "--pdeathsig",
            "KILL",
            "--",
            "libvirtd",
        ];
        args = become_nobody.map(str::to_owned).to_vec();
    }
    Spec {
        name: "libvirtd".to_owned(),
        program,
        args,
        env: vec![
            (
                "PATH".to_owned(),
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
            ),
            ("HOME".to_owned(), path("home")),
            ("XDG_RUNTIME_DIR".to_owned(), path("run")),
        ],
        log: root.join("libvirtd.log"),
    }
}

/// Lets the user of libvirtd open `/dev/net/tun`, in a mount namespace of its own: on some machines only root may.
fn with_tun_device(spec: Spec, root: &Path) -> Spec {
    let device = root.join("tun");
    let everybody = Mode::from_raw_mode(0o666);
    mknodat(
        CWD,
        &device,
        FileType::CharacterDevice,
        everybody,
        makedev(10, 200),
    )
    .expect("the test runs as root");
    fs::set_permissions(&device, fs::Permissions::from_mode(0o666)).unwrap();
    let mount = format!("mount --bind {} /dev/net/tun && exec \"$@\"", device.display());
    let mut args = ["--mount", "--propagation", "private", "sh", "-c", &mount, "sh"]
        .map(str::to_owned)
        .to_vec();
    args.push(spec.program.display().to_string());
    args.extend(spec.args);
    Spec {
        program: PathBuf::from("unshare"),
        args,
        ..spec
    }
}
