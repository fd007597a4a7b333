//! Selects whether NATS and the database run as local processes or in containers.

use std::{env, sync::OnceLock};

use crate::{Container, Process, container::engine_has};

/// Environment variable that forces a backend: `processes` or `containers`.
const VARIABLE: &str = "VMWATCH_TEST_BACKEND";
/// Environment variables with the path of a server's program. If one of them is set, servers run as processes.
const PROGRAMS: [&str; 2] = ["VMWATCH_TEST_NATS_SERVER", "VMWATCH_TEST_DATABASE"];

/// The backend: how NATS and the database are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Backend {
    Processes,
    Containers,
}

impl Backend {
    /// The backend of this test run. It is selected and printed only once.
    ///
    /// # Panics
    /// If the backend that the environment variable forces is not available.
    pub(crate) fn chosen() -> Self {
        static CHOSEN: OnceLock<Backend> = OnceLock::new();
        *CHOSEN.get_or_init(|| {
            let (backend, why) = Self::choose();
            match backend {
                Self::Processes => eprintln!("servers: local processes ({why})"),
                Self::Containers => eprintln!("servers: containers of {} ({why})", images().join(" and ")),
            }
            backend
        })
    }

    fn choose() -> (Self, String) {
        let given = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        match given(VARIABLE).as_deref() {
            Some("processes") => (Self::Processes, VARIABLE.to_owned()),
            Some("containers") => {
                // No images are checked here, because the engine pulls missing images.
                engine_has(&[]).unwrap_or_else(|why| panic!("{VARIABLE}=containers, but {why}"));
                (Self::Containers, VARIABLE.to_owned())
            }
            Some(other) => panic!("{VARIABLE}={other}: must be processes or containers"),
            None => match PROGRAMS.into_iter().find(|&name| given(name).is_some()) {
                Some(program) => (Self::Processes, format!("{program} is set")),
                None => match engine_has(&images()) {
                    Ok(()) => (Self::Containers, "the Docker engine has the images".to_owned()),
                    Err(why) => (Self::Processes, why),
                },
            },
        }
    }
}

/// The container image of a server: the value of the environment variable, or its default in compose.yaml.
pub(crate) fn image(variable: &str) -> String {
    if let Some(given) = env::var(variable).ok().filter(|value| !value.is_empty()) {
        return given;
    }
    let compose = include_str!("../../compose.yaml");
    let (_, rest) = compose
        .split_once(&format!("${{{variable}:-"))
        .unwrap_or_else(|| panic!("compose.yaml has no default for {variable}"));
    rest.split('}').next().unwrap_or_default().to_owned()
}

pub(crate) const NATS_IMAGE: &str = "VMWATCH_NATS_IMAGE";
pub(crate) const MONGO_IMAGE: &str = "VMWATCH_MONGO_IMAGE";

fn images() -> [String; 2] {
    [image(NATS_IMAGE), image(MONGO_IMAGE)]
}

/// A NATS or database server that a test can control.
#[derive(Debug)]
pub enum Server {
    /// The server runs as a local process.
    Process(Process),
    /// The server runs in a container.
    Container(Container),
}

impl Server {
    /// Sends SIGKILL, which is like a crash, and waits until the server has ended.
    pub fn kill9(&self) {
        match self {
            Self::Process(process) => process.kill9(),
            Self::Container(container) => container.kill9(),
        }
    }

    /// Freezes the server: it keeps its connections open but does not answer.
    pub fn pause(&self) {
        match self {
            Self::Process(process) => process.pause(),
            Self::Container(container) => container.pause(),
        }
    }

    /// Continues a server that was frozen by [`Server::pause`].
    pub fn resume(&self) {
        match self {
            Self::Process(process) => process.resume(),
            Self::Container(container) => container.resume(),
        }
    }

    /// Makes the server reload its configuration.
    pub fn reload(&self) {
        match self {
            Self::Process(process) => process.reload(),
            Self::Container(container) => container.reload(),
        }
    }

    /// Restarts the ended server with the same port and data.
    pub fn start_again(&self) {
        match self {
            Self::Process(process) => process.start_again(),
            Self::Container(container) => container.start_again(),
        }
    }

    /// The exit status, if the server has ended.
    pub fn ended(&self) -> Option<String> {
        match self {
            Self::Process(process) => process.ended().map(|status| status.to_string()),
            Self::Container(container) => container.ended().map(|code| format!("exit code {code}")),
        }
    }

    /// The server's output so far.
    pub fn log(&self) -> String {
        match self {
            Self::Process(process) => process.log(),
            Self::Container(container) => container.log(),
        }
    }

    /// The process id.
    ///
    /// # Panics
    /// If the server runs in a container.
    pub fn id(&self) -> u32 {
        match self {
            Self::Process(process) => process.id(),
            Self::Container(_) => panic!("a container has no local process id; set {VARIABLE}=processes"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_images_are_read_from_compose_yaml() {
        assert!(image(NATS_IMAGE).contains("nats:") || env::var(NATS_IMAGE).is_ok());
        assert!(image(MONGO_IMAGE).contains("mongo:") || env::var(MONGO_IMAGE).is_ok());
    }
}
