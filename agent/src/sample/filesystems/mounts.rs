//! Reads the list of mounts, and selects those whose filesystems are reported.
//!
//! The format is described in proc(5):
//!
//! ```text
//! 36 35 98:0 /root/of/mount /mount/point rw,noatime master:1 - ext4 /dev/sda1 rw
//! ```

use std::{
    cmp::Reverse,
    collections::HashMap,
    ffi::OsStr,
    fs::File,
    io::{self, Read},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

/// Maximum number of bytes that are read of the list, enough for some 50,000 mounts. Mounts beyond it are not reported.
const LIST_BYTES: u64 = 8 << 20;
/// Types of network filesystems, and of folders of the hypervisor. They have no block device, and may not answer.
const NETWORK: [&[u8]; 18] = [
    b"9p",
    b"afs",
    b"beegfs",
    b"ceph",
    b"cifs",
    b"fuse.ceph-fuse",
    b"fuse.glusterfs",
    b"fuse.sshfs",
    b"glusterfs",
    b"gpfs",
    b"lustre",
    b"nfs",
    b"nfs4",
    b"pvfs2",
    b"smb3",
    b"smbfs",
    b"virtiofs",
    b"wekafs",
];
/// Types of local filesystems that have no block device number of their own.
const WITHOUT_DEVICE: [&[u8]; 3] = [b"bcachefs", b"btrfs", b"zfs"];
/// Types of read-only images, which are always full: snaps, CDs and the data of cloud-init.
const IMAGES: [&[u8]; 6] = [b"cramfs", b"erofs", b"iso9660", b"romfs", b"squashfs", b"udf"];

/// A mount whose filesystem is reported.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct ReportedMount {
    /// The mount point, as the kernel names it.
    pub(super) mount_point: PathBuf,
    /// The type of the filesystem.
    pub(super) filesystem: String,
    pub(super) is_network: bool,
}

/// A line of the list.
#[derive(Debug)]
struct Line<'a> {
    id: &'a [u8],
    parent: &'a [u8],
    device: &'a [u8],
    is_block_device: bool,
    /// Whether the whole filesystem is mounted, not a part of it.
    is_whole: bool,
    mount_point: Vec<u8>,
    filesystem: &'a [u8],
}

/// Reads the mounts whose filesystems are reported: local ones first, each sorted by mount point.
pub(super) fn read(list: &Path) -> io::Result<Vec<ReportedMount>> {
    let mut content = Vec::new();
    File::open(list)?.take(LIST_BYTES).read_to_end(&mut content)?;
    Ok(select(&content))
}

/// Selects the mounts of block devices and network filesystems. Each device is reported once: if it is mounted several
/// times, with the shortest mount point.
fn select(list: &[u8]) -> Vec<ReportedMount> {
    let lines: Vec<Line<'_>> = list
        .split(|&byte| byte == b'\n')
        .filter_map(Line::parse)
        .collect();
    let parents: HashMap<&[u8], &[u8]> = lines.iter().map(|line| (line.id, line.parent)).collect();
    let mut by_device: HashMap<&[u8], Vec<&Line<'_>>> = HashMap::new();
    for line in lines.iter().filter(|line| line.is_reported()) {
        by_device.entry(line.device).or_default().push(line);
    }
    let mut mounts = Vec::new();
    for mut of_device in by_device.into_values() {
        of_device.sort_by_key(|line| (Reverse(line.is_whole), line.mount_point.len()));
        let visible = |line: &&&Line<'_>| !lines.iter().any(|other| other.hides(line, &parents));
        mounts.extend(of_device.iter().find(visible).map(|line| line.mount()));
    }
    mounts.sort_by(|one, other| {
        (one.is_network, &one.mount_point).cmp(&(other.is_network, &other.mount_point))
    });
    mounts
}

impl<'a> Line<'a> {
    fn parse(line: &'a [u8]) -> Option<Self> {
        let mut words = line.split(|&byte| byte == b' ');
        let (id, parent, device) = (words.next()?, words.next()?, words.next()?);
        let (root, mount_point) = (words.next()?, words.next()?);
        // The number of optional fields before the `-` varies.
        let filesystem = words.skip_while(|word| *word != b"-").nth(1)?;
        Some(Self {
            id,
            parent,
            device,
            is_block_device: !device.starts_with(b"0:"),
            is_whole: root == b"/",
            mount_point: unescaped(mount_point),
            filesystem,
        })
    }

    fn is_network(&self) -> bool {
        NETWORK.contains(&self.filesystem)
    }

    fn is_reported(&self) -> bool {
        if self.is_network() {
            return true;
        }
        let has_device = self.is_block_device || WITHOUT_DEVICE.contains(&self.filesystem);
        // A subvolume of btrfs is a part of its filesystem, as is `/` in some containers. Other parts are bind mounts.
        let is_whole_or_root = self.is_whole || self.filesystem == b"btrfs" || self.mount_point == b"/";
        has_device && is_whole_or_root && !IMAGES.contains(&self.filesystem)
    }

    /// Whether this mount hides another one: it is mounted over the other's mount point or a folder above it.
    fn hides(&self, other: &Self, parents: &HashMap<&[u8], &[u8]>) -> bool {
        let is_above = other
            .mount_point
            .strip_prefix(&*self.mount_point)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/") || self.mount_point == b"/");
        is_above && !self.carries(other, parents)
    }

    /// Whether the other mount is this one, or is mounted somewhere in it.
    fn carries(&self, other: &Self, parents: &HashMap<&[u8], &[u8]>) -> bool {
        let mut id = other.id;
        // A broken list may have circles.
        for _ in 0..=parents.len() {
            if id == self.id {
                return true;
            }
            match parents.get(id) {
                Some(parent) if *parent != id => id = parent,
                _ => return false,
            }
        }
        false
    }

    fn mount(&self) -> ReportedMount {
        ReportedMount {
            mount_point: PathBuf::from(OsStr::from_bytes(&self.mount_point)),
            filesystem: String::from_utf8_lossy(self.filesystem).into_owned(),
            is_network: self.is_network(),
        }
    }
}

/// Decodes the octal escapes of spaces, tabs, line breaks and backslashes.
fn unescaped(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        rest = tail;
        if let (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..]) = (first, tail) {
            out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
            rest = after;
        } else {
            out.push(*first);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A case: its name, the list of mounts, and the mount points that are reported.
    type Case = (&'static str, &'static str, &'static [&'static str]);

    const CASES: [Case; 15] = [
        (
            "pseudo filesystems, memory and overlays are left out",
            "22 27 0:21 / /proc rw - proc proc rw\n23 27 0:22 / /sys rw - sysfs sysfs rw\n24 27 0:23 / /run rw - tmpfs tmpfs rw\n27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n28 27 0:30 / /var/lib/docker/overlay2/x/merged rw - overlay overlay rw,lowerdir=/a\n29 27 0:31 / /misc rw - autofs systemd-1 rw\n",
            &["/"],
        ),
        (
            "images are left out",
            "27 1 254:0 / / rw - ext4 /dev/vda rw\n30 27 7:0 / /snap/core/1 ro - squashfs /dev/loop0 ro\n31 27 11:0 / /media/cd ro - iso9660 /dev/sr0 ro\n",
            &["/"],
        ),
        (
            "bind mounts are left out",
            "27 1 254:0 / / rw - xfs /dev/vda rw\n30 27 254:0 /data /srv/data rw - xfs /dev/vda rw\n31 27 254:16 /hosts /etc/hosts rw - ext4 /dev/vdb rw\n",
            &["/"],
        ),
        (
            "a filesystem that is mounted several times counts once",
            "30 27 254:16 / /mnt/second rw - ext4 /dev/vdb rw\n31 27 254:16 / /mnt/a rw - ext4 /dev/vdb rw\n",
            &["/mnt/a"],
        ),
        (
            "subvolumes of btrfs count once",
            "27 1 0:25 /@ / rw shared:1 - btrfs /dev/vda2 rw\n30 27 0:25 /@home /home rw shared:2 - btrfs /dev/vda2 rw\n",
            &["/"],
        ),
        (
            "network filesystems come last",
            "30 27 0:50 / /a rw,relatime shared:9 master:1 - nfs4 server:/export rw,vers=4.2\n31 27 0:51 / /b rw - fuse.sshfs user@host: rw\n27 1 254:0 / / rw - ext4 /dev/vda rw\n",
            &["/", "/a", "/b"],
        ),
        (
            "other filesystems in user space are left out, but not those of block devices",
            "30 27 0:50 / /run/user/1000/gvfs rw - fuse.gvfsd-fuse gvfsd-fuse rw\n31 27 8:17 / /usb rw - fuseblk /dev/sdb1 rw\n",
            &["/usb"],
        ),
        (
            "a pool of ZFS has a filesystem for each dataset",
            "30 27 0:40 / /tank rw - zfs tank rw\n31 30 0:41 / /tank/db rw - zfs tank/db rw\n",
            &["/tank", "/tank/db"],
        ),
        (
            "a mount point with spaces, line breaks and a backslash",
            "30 27 254:16 / /mnt/a\\040b\\012c\\134d rw - ext4 /dev/vdb rw\n",
            &["/mnt/a b\nc\\d"],
        ),
        (
            "the filesystem mounted last at a mount point hides the others",
            "30 27 254:16 / /mnt rw - ext4 /dev/vdb rw\n31 30 254:32 / /mnt rw - ext4 /dev/vdc rw\n",
            &["/mnt"],
        ),
        (
            "a mount below a folder over which another one was mounted is hidden",
            "27 1 254:0 / / rw - ext4 /dev/vda rw\n30 27 254:16 / /mnt/a rw - ext4 /dev/vdb rw\n31 27 0:60 / /mnt rw - tmpfs tmpfs rw\n32 27 254:32 / /mntb rw - ext4 /dev/vdc rw\n",
            &["/", "/mntb"],
        ),
        (
            "a hidden mount does not prevent the report of another one of its device",
            "27 1 254:0 / / rw - ext4 /dev/vda rw\n30 27 254:16 / /mnt/a rw - ext4 /dev/vdb rw\n31 27 0:60 / /mnt rw - tmpfs tmpfs rw\n32 27 254:16 / /longer/mount rw - ext4 /dev/vdb rw\n",
            &["/", "/longer/mount"],
        ),
        (
            "the first root filesystem, which the real one was mounted over, is left out",
            "1 1 0:2 / / rw - rootfs rootfs rw\n27 1 254:0 / / rw - ext4 /dev/vda rw\n",
            &["/"],
        ),
        (
            "a container whose root is a folder of the host",
            "100 90 254:0 /var/lib/lxc/c/rootfs / rw - ext4 /dev/vda rw\n101 100 254:0 /hosts /etc/hosts rw - ext4 /dev/vda rw\n",
            &["/"],
        ),
        (
            "malformed lines and circles",
            "\n27 1\n27 1 254:0 / / rw\nx y 254:0 / /x rw -\n30 31 254:16 / /a rw - ext4 /dev/vdb rw\n31 30 254:32 / /b rw - ext4 /dev/vdc rw\n",
            &["/a", "/b"],
        ),
    ];

    #[test]
    fn mounts_of_block_devices_and_network_filesystems_are_selected() {
        for (name, list, expected) in CASES {
            let selected = select(list.as_bytes());
            let found: Vec<_> = selected
                .iter()
                .map(|mount| mount.mount_point.to_str().unwrap())
                .collect();
            assert_eq!(found, expected, "{name}");
        }
    }

    #[test]
    fn visible_one_of_two_filesystems_at_one_mount_point_is_selected() {
        let list = "30 27 254:16 / /mnt rw - ext4 /dev/vdb rw\n31 30 0:77 / /mnt rw - nfs server:/x rw\n";
        let expected = ReportedMount {
            mount_point: "/mnt".into(),
            filesystem: "nfs".to_owned(),
            is_network: true,
        };
        assert_eq!(select(list.as_bytes()), [expected]);
    }
}
