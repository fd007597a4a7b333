//! Serves the script that installs the agent in a VM, and the packages that the script installs.
//!
//! The script contains the gateway's public URL and the checksums of the packages. Both come from settings, and nothing
//! comes from a request, such as its `Host`: otherwise a request could make the script download from another server.
//!
//! The packages are kept in memory, so that a checksum always belongs to the package that is served.

mod packages;
mod public_url;

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use axum::{
    Router,
    body::Body,
    extract::{ConnectInfo, Path, Request, State},
    http::{HeaderValue, Response, StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use bytes::Bytes;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use vmwatch_api::wire::Fault;

use self::{
    packages::{CHECK_INTERVAL, Package, Packages},
    public_url::PublicUrl,
};
use crate::Gateway;

const SCRIPT: &str = include_str!("../../deploy/package/install.sh");
/// The texts that the gateway replaces in the script.
const URL_MARK: &str = "@PUBLIC_URL@";
const PACKAGES_MARK: &str = "@PACKAGES@";

const NO_URL: &str = "this gateway does not serve the agent: its operator must set VMWATCH_PUBLIC_URL";
const NO_FOLDER: &str = "this gateway does not serve the agent: its operator must set VMWATCH_PACKAGES_DIR";
const NO_PACKAGE: &str = "this gateway does not have a package with this name";

/// Where VMs reach the gateway, and the folder with the agent's packages.
#[derive(Debug, Clone, Default)]
pub(crate) struct InstallSettings {
    pub(crate) public_url: Option<PublicUrl>,
    pub(crate) packages: Option<PathBuf>,
}

/// What the gateway serves for the installation of agents, or why it serves nothing.
pub(crate) struct Install(Result<Source, &'static str>);

struct Source {
    url: PublicUrl,
    packages: watch::Receiver<Arc<Packages>>,
}

impl Install {
    /// Reads the packages, and follows changes of them until shutdown.
    pub(crate) async fn load(settings: InstallSettings, shutdown: CancellationToken) -> Self {
        let InstallSettings { public_url, packages } = settings;
        let source = match (public_url, packages) {
            (None, _) => Err(NO_URL),
            (_, None) => Err(NO_FOLDER),
            (Some(url), Some(folder)) => Ok(Source {
                url,
                packages: packages::follow(folder, CHECK_INTERVAL, shutdown).await,
            }),
        };
        Self(source)
    }

    /// The URL of the script; `None` if the gateway does not serve it.
    pub(crate) fn script_url(&self) -> Option<String> {
        let source = self.0.as_ref().ok()?;
        Some(format!("{}/install.sh", source.url.as_str()))
    }

    fn script(&self) -> Result<String, &'static str> {
        let source = self.0.as_ref().map_err(|reason| *reason)?;
        let packages = source.packages.borrow().checksums();
        Ok(SCRIPT
            .replace(URL_MARK, source.url.as_str())
            .replace(PACKAGES_MARK, &packages))
    }

    fn package(&self, name: &str) -> Result<Arc<Package>, &'static str> {
        let source = self.0.as_ref().map_err(|reason| *reason)?;
        source.packages.borrow().get(name).ok_or(NO_PACKAGE)
    }
}

pub(crate) fn routes() -> Router<Arc<Gateway>> {
    Router::new()
        .route("/install.sh", get(script))
        .route("/packages/{file}", get(package))
}

async fn script(State(gateway): State<Arc<Gateway>>, request: Request) -> Response<Body> {
    if let Err(fault) = admit(&gateway, &request, "install_script") {
        return refused(&fault);
    }
    match gateway.install.script() {
        Ok(script) => answer(script.into(), "text/x-shellscript; charset=utf-8"),
        Err(reason) => not_found(reason),
    }
}

async fn package(
    State(gateway): State<Arc<Gateway>>,
    Path(name): Path<String>,
    request: Request,
) -> Response<Body> {
    if let Err(fault) = admit(&gateway, &request, "package") {
        return refused(&fault);
    }
    match gateway.install.package(&name) {
        Ok(package) => answer(package.content.clone(), package.media_type()),
        Err(reason) => not_found(reason),
    }
}

/// These requests have no session, so their number is limited by source address.
fn admit(gateway: &Gateway, request: &Request, what: &'static str) -> Result<(), Fault> {
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>();
    let source = peer.map(|peer| gateway.proxies.client(peer.0, request.headers()).to_string());
    gateway.admission.check_download(what, source.as_deref())
}

fn answer(content: Bytes, media_type: &'static str) -> Response<Body> {
    let media_type = (header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    ([media_type], Body::from(content)).into_response()
}

/// The answers are read by people in a terminal, so the reason is a plain text.
fn not_found(reason: &str) -> Response<Body> {
    (StatusCode::NOT_FOUND, format!("{reason}\n")).into_response()
}

fn refused(fault: &Fault) -> Response<Body> {
    let wait = fault
        .retry_after
        .unwrap_or_default()
        .as_millis()
        .div_ceil(1000)
        .max(1);
    let wait = (header::RETRY_AFTER, wait.to_string());
    (
        StatusCode::TOO_MANY_REQUESTS,
        [wait],
        format!("{}\n", fault.message),
    )
        .into_response()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    async fn install(url: Option<&str>, folder: Option<PathBuf>) -> Install {
        let settings = InstallSettings {
            public_url: url.map(|url| url.parse().unwrap()),
            packages: folder,
        };
        Install::load(settings, CancellationToken::new()).await
    }

    #[tokio::test]
    async fn gateway_without_settings_states_which_one_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let path = Some(folder.path().to_owned());
        let url = Some("https://vmwatch.example.com");
        for (url, folder, missing) in [
            (None, None, "VMWATCH_PUBLIC_URL"),
            (None, path, "VMWATCH_PUBLIC_URL"),
            (url, None, "VMWATCH_PACKAGES_DIR"),
        ] {
            let install = install(url, folder).await;
            assert_eq!(install.script_url(), None);
            for reason in [
                install.script().unwrap_err(),
                install.package("vmwatch-agent.deb").err().unwrap(),
            ] {
                assert!(reason.contains(missing), "{reason}");
            }
        }
    }

    #[tokio::test]
    async fn script_has_the_url_and_the_checksum_of_each_package() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("vmwatch-agent.deb"), "abc").unwrap();
        let install = install(
            Some("https://vmwatch.example.com/"),
            Some(folder.path().to_owned()),
        )
        .await;
        assert_eq!(
            install.script_url().unwrap(),
            "https://vmwatch.example.com/install.sh"
        );
        let script = install.script().unwrap();
        assert!(
            script.contains("GATEWAY='https://vmwatch.example.com'\n"),
            "{script}"
        );
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert!(
            script.contains(&format!("PACKAGES='vmwatch-agent.deb {abc}'\n")),
            "{script}"
        );
        assert!(![URL_MARK, PACKAGES_MARK].iter().any(|mark| script.contains(mark)));
        assert_eq!(install.package("vmwatch-agent.deb").unwrap().content, "abc");
    }
}
