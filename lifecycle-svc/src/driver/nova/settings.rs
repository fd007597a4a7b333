//! Settings of an OpenStack cloud: a TOML file that names further files with the secrets.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use zeroize::Zeroizing;

/// A secret that is hidden from `Debug` output and wiped from memory when dropped.
#[derive(Clone)]
pub(super) struct Secret(Zeroizing<String>);

impl Secret {
    /// Returns the secret in plain text, for the login request.
    pub(super) fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Address of an OpenStack cloud and the credentials for it.
#[derive(Debug, Clone)]
pub(crate) struct NovaSettings {
    /// Address of Keystone, including the version.
    pub(super) auth_url: String,
    pub(super) login: Login,
    /// Region of Nova's endpoint in the service catalogue. It may be `None` if the catalogue has one region.
    pub(super) region: Option<String>,
    /// Interface of Nova's endpoint in the service catalogue, such as `public`.
    pub(super) interface: String,
    /// Address of Nova to use instead of the one in the service catalogue.
    pub(super) compute_url: Option<String>,
    /// Whether to list the VMs of all projects, which requires an administrator of the cloud.
    pub(super) all_projects: bool,
    /// PEM certificates of the authorities to trust instead of those of the operating system.
    pub(super) ca: Option<Vec<u8>>,
}

/// Credentials for logging in to Keystone.
#[derive(Debug, Clone)]
pub(super) enum Login {
    Password {
        user: String,
        user_domain: String,
        project: String,
        project_domain: String,
        password: Secret,
    },
    ApplicationCredential {
        id: String,
        secret: Secret,
    },
}

/// Contents of the TOML file with the settings of a cloud.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    auth_url: String,
    region: Option<String>,
    #[serde(default = "public")]
    interface: String,
    compute_url: Option<String>,
    #[serde(default)]
    all_projects: bool,
    ca_file: Option<PathBuf>,
    application_credential_id: Option<String>,
    application_credential_secret_file: Option<PathBuf>,
    username: Option<String>,
    #[serde(default = "default_domain")]
    user_domain: String,
    project: Option<String>,
    #[serde(default = "default_domain")]
    project_domain: String,
    password_file: Option<PathBuf>,
}

fn public() -> String {
    "public".to_owned()
}

fn default_domain() -> String {
    "Default".to_owned()
}

impl NovaSettings {
    /// Reads the TOML file and the files that it names. The error describes the problem without revealing a secret.
    pub(crate) fn read(path: &Path) -> Result<Self, String> {
        let text = fs::read_to_string(path)
            .map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
        let file: Document =
            toml::from_str(&text).map_err(|error| format!("{}: {}", path.display(), error.message()))?;
        let in_file = |problem: String| format!("{}: {problem}", path.display());
        for url in [Some(&file.auth_url), file.compute_url.as_ref()]
            .into_iter()
            .flatten()
        {
            if !(url.starts_with("https://") || url.starts_with("http://")) {
                return Err(in_file(format!("`{url}` is not an http(s) address")));
            }
        }
        let ca = file.ca_file.as_deref().map(fs::read).transpose();
        Ok(Self {
            ca: ca.map_err(|error| in_file(format!("ca_file cannot be read: {error}")))?,
            login: file.login().map_err(in_file)?,
            auth_url: with_version(&file.auth_url),
            region: file.region,
            interface: file.interface,
            compute_url: file.compute_url.map(|url| url.trim_end_matches('/').to_owned()),
            all_projects: file.all_projects,
        })
    }
}

/// Adds the version to the address of Keystone, unless the address has it.
fn with_version(auth_url: &str) -> String {
    let url = auth_url.trim_end_matches('/');
    if url.ends_with("/v3") {
        url.to_owned()
    } else {
        format!("{url}/v3")
    }
}

impl Document {
    fn login(&self) -> Result<Login, String> {
        match (&self.application_credential_id, &self.username, &self.project) {
            (Some(id), None, None) => Ok(Login::ApplicationCredential {
                id: id.clone(),
                secret: secret(
                    "application_credential_secret_file",
                    self.application_credential_secret_file.as_deref(),
                )?,
            }),
            (None, Some(user), Some(project)) => Ok(Login::Password {
                user: user.clone(),
                user_domain: self.user_domain.clone(),
                project: project.clone(),
                project_domain: self.project_domain.clone(),
                password: secret("password_file", self.password_file.as_deref())?,
            }),
            _ => Err(
                "set username, project and password_file, or application_credential_id and \
                      application_credential_secret_file"
                    .to_owned(),
            ),
        }
    }
}

fn secret(key: &str, path: Option<&Path>) -> Result<Secret, String> {
    let path = path.ok_or_else(|| format!("{key} is missing"))?;
    let text = fs::read_to_string(path)
        .map_err(|error| format!("{key}: {} cannot be read: {error}", path.display()))?;
    let text = Zeroizing::new(text);
    Ok(Secret(Zeroizing::new(
        text.trim_end_matches(['\r', '\n']).to_owned(),
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(folder: &Path, text: &str) -> Result<NovaSettings, String> {
        let path = folder.join("nova.toml");
        fs::write(&path, text).unwrap();
        NovaSettings::read(&path)
    }

    #[test]
    fn cloud_settings_and_secret_files_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let secret = folder.path().join("secret");
        fs::write(&secret, "hunter2\n").unwrap();
        let secret = secret.display();
        let settings = read(
            folder.path(),
            &format!(
                "auth_url = 'https://cloud/v3/'\nusername = 'u'\nproject = 'p'\npassword_file = '{secret}'"
            ),
        )
        .unwrap();
        assert_eq!(
            (settings.auth_url.as_str(), settings.interface.as_str()),
            ("https://cloud/v3", "public")
        );
        let Login::Password {
            password,
            user_domain,
            ..
        } = &settings.login
        else {
            panic!("{settings:?}")
        };
        assert_eq!((password.reveal(), user_domain.as_str()), ("hunter2", "Default"));
        assert!(!format!("{settings:?}").contains("hunter2"));

        for url in [
            "http://cloud",
            "http://cloud/",
            "http://cloud/v3",
            "http://cloud/v3//",
        ] {
            assert_eq!(with_version(url), "http://cloud/v3");
        }
        assert_eq!(with_version("http://v3/identity"), "http://v3/identity/v3");

        let settings = read(
            folder.path(),
            &format!(
                "auth_url = 'http://cloud/v3'\napplication_credential_id = 'i'\n\
                 application_credential_secret_file = '{secret}'"
            ),
        );
        assert!(matches!(
            settings.unwrap().login,
            Login::ApplicationCredential { .. }
        ));
    }

    #[test]
    fn problems_in_cloud_settings_are_reported_without_secrets() {
        let folder = tempfile::tempdir().unwrap();
        for (text, part) in [
            ("", "missing field `auth_url`"),
            ("auth_url = 'cloud'", "not an http(s) address"),
            ("auth_url = 'http://cloud'", "set username"),
            (
                "auth_url = 'http://cloud'\npassword = 'hunter2'",
                "unknown field `password`",
            ),
            (
                "auth_url = 'http://cloud'\nusername = 'u'\nproject = 'p'",
                "password_file is missing",
            ),
            (
                "auth_url = 'http://cloud'\nusername = 'u'\nproject = 'p'\npassword_file = '/nowhere'",
                "/nowhere cannot be read",
            ),
        ] {
            let problem = read(folder.path(), text).unwrap_err();
            assert!(problem.contains(part), "{text}: {problem}");
            assert!(!problem.contains("hunter2"), "{problem}");
        }
    }
}
