//! A real hypervisor for tests: libvirtd in session mode, with a QEMU guest that runs the agent.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::Command,
};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::{PATIENCE, Process, Spec, eventually, tools};

/// User id of `nobody` on Debian. QEMU needs no further permissions, and libvirtd in session mode must not run as root.
const NOBODY: u32 = 65_534;

/// A libvirtd in session mode with its own folder. Dropping it ends libvirtd and its guests.
#[derive(Debug)]
pub struct Libvirtd {
    /// The process of libvirtd.
    pub process: Process,
    folder: TempDir,
}

impl Libvirtd {
    /// Starts libvirtd and waits until it answers.
    pub async fn start() -> Self {
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
        for part in ["vmlinuz", "initramfs.gz"] {
            fs::copy(tools::guest_image().join(part), root.join("image").join(part)).unwrap();
        }
        let as_root = rustix::process::getuid().is_root();
        if as_root {
            for name in ["home", "home/.config", "home/.config/libvirt", "run"] {
                chown(root.join(name), Some(NOBODY), Some(NOBODY)).unwrap();
            }
        }
        let process = Process::start(spec(&root, as_root));
        let this = Self { process, folder };
        eventually("libvirtd answers", PATIENCE, async || this.try_virsh(&["list"])).await;
        this
    }

    /// The connection URI for the `libvirt` driver.
    pub fn uri(&self) -> String {
        let socket = self.folder.path().join("run/libvirt/libvirt-sock");
        format!("qemu+unix:///session?socket={}", socket.display())
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
        let root = self.folder.path();
        let settings: Vec<_> = settings
            .iter()
            .map(|(name, value)| format!("vmwatch.{name}={value}"))
            .collect();
        let template = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/guest/domain.xml");
        let domain = fs::read_to_string(template)
            .unwrap()
            .replace("{name}", &format!("guest-{uuid}"))
            .replace("{uuid}", uuid)
            .replace("{image}", &root.join("image").display().to_string())
            .replace("{settings}", &settings.join(" "))
            .replace("{console}", &self.console_file(uuid).display().to_string());
        let file = root.join(format!("{uuid}.xml"));
        fs::write(&file, domain).unwrap();
        self.virsh(&["define", &file.display().to_string()]);
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
