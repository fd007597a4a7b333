//! The configuration file: gateways ("contexts") with the tokens of their sessions.
//!
//! Only the owner may read the file. It is replaced as a whole, so a killed command leaves either the old or the new
//! one.

use std::{
    collections::BTreeMap,
    env,
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{error::CliError, secret::Token, url::GatewayUrl};

/// Maximum size of the file.
const MAX_BYTES: u64 = 1 << 20;

#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// The context that is used unless a command names another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) current: Option<String>,
    #[serde(default)]
    pub(crate) contexts: BTreeMap<String, Context>,
}

/// A gateway, and how to authenticate to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Context {
    pub(crate) url: GatewayUrl,
    /// Certificate authorities of the gateway, in PEM; without it, those of the system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ca_file: Option<PathBuf>,
    /// The file that has an API token; takes precedence over `token`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) token_file: Option<PathBuf>,
    /// The token of the session that `vmwatch login` created.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) token: Option<Token>,
}

/// A configuration file and its content.
#[derive(Debug)]
pub(crate) struct ConfigFile {
    path: PathBuf,
    pub(crate) config: Config,
}

impl ConfigFile {
    /// Reads the file, which need not exist.
    pub(crate) fn load() -> Result<Self, CliError> {
        Self::load_from(default_path()?)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn load_from(path: PathBuf) -> Result<Self, CliError> {
        let config = match File::open(&path) {
            Ok(file) => read(file).map_err(|reason| CliError::File {
                path: path.clone(),
                reason,
            })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Config::default(),
            Err(error) => {
                let reason = error.to_string();
                return Err(CliError::File { path, reason });
            }
        };
        Ok(Self { path, config })
    }

    /// Writes the file, which only its owner may read.
    pub(crate) fn save(&self) -> Result<(), CliError> {
        let failed = |reason: String| CliError::File {
            path: self.path.clone(),
            reason: format!("cannot be written: {reason}"),
        };
        let text = toml::to_string(&self.config).map_err(|error| failed(error.to_string()))?;
        replace(&self.path, &text).map_err(|error| failed(error.to_string()))
    }
}

fn default_path() -> Result<PathBuf, CliError> {
    let folder = |name: &str| {
        env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    folder("VMWATCH_CONFIG")
        .or_else(|| Some(folder("XDG_CONFIG_HOME")?.join("vmwatch/config.toml")))
        .or_else(|| Some(folder("HOME")?.join(".config/vmwatch/config.toml")))
        .ok_or_else(|| CliError::Usage("set HOME, XDG_CONFIG_HOME or VMWATCH_CONFIG".to_owned()))
}

fn read(file: File) -> Result<Config, String> {
    let metadata = file.metadata().map_err(|error| error.to_string())?;
    if metadata.permissions().mode() & 0o077 != 0 {
        return Err(
            "other users may access this file, which contains tokens; run `chmod 600` on it".to_owned(),
        );
    }
    let mut text = String::new();
    let read = file.take(MAX_BYTES + 1).read_to_string(&mut text);
    read.map_err(|error| error.to_string())?;
    if u64::try_from(text.len()).is_ok_and(|bytes| bytes > MAX_BYTES) {
        return Err(format!("has more than {MAX_BYTES} bytes"));
    }
    // The whole message of the parser quotes the line, which may contain a token.
    toml::from_str(&text).map_err(|error| {
        let before = error
            .span()
            .and_then(|span| text.get(..span.start))
            .unwrap_or_default();
        format!("line {}: {}", before.split('\n').count(), error.message())
    })
}

/// Replaces the file in one step.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let temporary = folder.join(format!(".config.{}.tmp", std::process::id()));
    let written = write_new(&temporary, text).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // The temporary file may not exist.
        let _ = fs::remove_file(&temporary);
    }
    written
}

fn write_new(path: &Path, text: &str) -> io::Result<()> {
    // Left by a process with the same id that was killed.
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error);
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    // The process may have a umask that takes permissions from the owner.
    file.set_permissions(Permissions::from_mode(0o600))?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved(folder: &Path) -> ConfigFile {
        let context = Context {
            url: "https://vmwatch.example.com".parse().unwrap(),
            ca_file: None,
            token_file: None,
            token: Some("9afdb1ec-d396-4ba3-af7a-1e38fd8751ca".parse().unwrap()),
        };
        let file = ConfigFile {
            path: folder.join("vmwatch/config.toml"),
            config: Config {
                current: Some("lab".to_owned()),
                contexts: [("lab".to_owned(), context)].into(),
            },
        };
        file.save().unwrap();
        file
    }

    #[test]
    fn saved_file_is_read_again_and_belongs_to_its_owner_only() {
        let folder = tempfile::tempdir().unwrap();
        let file = saved(folder.path());
        let read = ConfigFile::load_from(file.path.clone()).unwrap();
        assert_eq!(read.config, file.config);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&file.path), 0o600);
        assert_eq!(mode(file.path.parent().unwrap()), 0o700);
        let names = fs::read_dir(file.path.parent().unwrap()).unwrap();
        assert_eq!(names.count(), 1, "the temporary file is left");
    }

    #[test]
    fn file_that_others_may_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = saved(folder.path());
        for mode in [0o640, 0o604, 0o660] {
            fs::set_permissions(&file.path, Permissions::from_mode(mode)).unwrap();
            let error = ConfigFile::load_from(file.path.clone()).unwrap_err().to_string();
            assert!(error.contains("run `chmod 600` on it"), "{error}");
        }
    }

    #[test]
    fn invalid_file_is_refused_without_repeating_its_tokens() {
        let folder = tempfile::tempdir().unwrap();
        let file = saved(folder.path());
        let context = "[contexts.lab]\nurl = \"https://a.example\"\n";
        for (text, reason) in [
            (
                format!("{context}token = \"s3cret s3cret\"\n"),
                "line 3: a token has 1 to 512",
            ),
            (format!("{context}token = s3cret\n"), "line 3: "),
            (
                format!("{context}tokn = \"s3cret\"\n"),
                "line 3: unknown field `tokn`",
            ),
            (
                "[contexts.lab]\nurl = \"http://a.example\"\n".to_owned(),
                "line 2: must be a URL",
            ),
        ] {
            fs::write(&file.path, text).unwrap();
            let error = ConfigFile::load_from(file.path.clone()).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
            assert!(!error.contains("s3cret"), "{error}");
        }
    }
}
