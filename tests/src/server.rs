//! Where NATS and the database run: as processes of this machine, or in containers.

use std::{env, sync::OnceLock};

use crate::{Container, Process, container::engine_has};

/// Forces one of the two.
const VARIABLE: &str = "VMWATCH_TEST_BACKEND";
/// Who names a server's program wants a process of it.
const PROGRAMS: [&str; 2] = ["VMWATCH_TEST_NATS_SERVER", "VMWATCH_TEST_DATABASE"];

/// The two ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Backend {
    Processes,
    Containers,
}

impl Backend {
    /// The one of this run. It is chosen, and told, once.
    ///
    /// # Panics
    /// Where one is forced that there is not.
    pub(crate) fn chosen() -> Self {
        static CHOSEN: OnceLock<Backend> = OnceLock::new();
        *CHOSEN.get_or_init(|| {
            let (backend, why) = Self::choose();
            match backend {
                Self::Processes => eprintln!("servers: processes of this machine ({why})"),
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
                // An image that is not there is pulled.
                engine_has(&[]).unwrap_or_else(|why| panic!("{VARIABLE}=containers, but {why}"));
                (Self::Containers, VARIABLE.to_owned())
            }
            Some(other) => panic!("{VARIABLE}={other}: write processes or containers"),
            None => match PROGRAMS.into_iter().find(|&name| given(name).is_some()) {
                Some(program) => (Self::Processes, format!("{program} names one")),
                None => match engine_has(&images()) {
                    Ok(()) => (Self::Containers, "a Docker engine has them".to_owned()),
                    Err(why) => (Self::Processes, why),
                },
            },
        }
    }
}

/// The image of a server: what the variable says, else what compose.yaml takes without it.
pub(crate) fn image(variable: &str) -> String {
    if let Some(given) = env::var(variable).ok().filter(|value| !value.is_empty()) {
        return given;
    }
    let compose = include_str!("../../compose.yaml");
    let (_, rest) = compose
        .split_once(&format!("${{{variable}:-"))
        .unwrap_or_else(|| panic!("compose.yaml has no default of {variable}"));
    rest.split('}').next().unwrap_or_default().to_owned()
}

pub(crate) const NATS_IMAGE: &str = "VMWATCH_NATS_IMAGE";
pub(crate) const MONGO_IMAGE: &str = "VMWATCH_MONGO_IMAGE";

fn images() -> [String; 2] {
    [image(NATS_IMAGE), image(MONGO_IMAGE)]
}

/// NATS or the database, and all that a test may do to it.
#[derive(Debug)]
pub enum Server {
    /// A process of this machine.
    Process(Process),
    /// In a container.
    Container(Container),
}

impl Server {
    /// SIGKILL, as a crash or a lost machine; waits for the end.
    pub fn kill9(&self) {
        match self {
            Self::Process(process) => process.kill9(),
            Self::Container(container) => container.kill9(),
        }
    }

    /// It holds its connections and answers nothing.
    pub fn pause(&self) {
        match self {
            Self::Process(process) => process.pause(),
            Self::Container(container) => container.pause(),
        }
    }

    /// Ends a pause.
    pub fn resume(&self) {
        match self {
            Self::Process(process) => process.resume(),
            Self::Container(container) => container.resume(),
        }
    }

    /// It reads its configuration again.
    pub fn reload(&self) {
        match self {
            Self::Process(process) => process.reload(),
            Self::Container(container) => container.reload(),
        }
    }

    /// Starts it again, with the same port and store, after it has ended.
    pub fn start_again(&self) {
        match self {
            Self::Process(process) => process.start_again(),
            Self::Container(container) => container.start_again(),
        }
    }

    /// How it has ended, if it has.
    pub fn ended(&self) -> Option<String> {
        match self {
            Self::Process(process) => process.ended().map(|status| status.to_string()),
            Self::Container(container) => container.ended().map(|code| format!("exit code {code}")),
        }
    }

    /// What it has written so far.
    pub fn log(&self) -> String {
        match self {
            Self::Process(process) => process.log(),
            Self::Container(container) => container.log(),
        }
    }

    /// Its process id.
    ///
    /// # Panics
    /// In a container it has none of this machine's.
    pub fn id(&self) -> u32 {
        match self {
            Self::Process(process) => process.id(),
            Self::Container(_) => panic!("what a server costs is measured with {VARIABLE}=processes"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_images_are_those_of_compose_yaml() {
        assert!(image(NATS_IMAGE).contains("nats:") || env::var(NATS_IMAGE).is_ok());
        assert!(image(MONGO_IMAGE).contains("mongo:") || env::var(MONGO_IMAGE).is_ok());
    }
}
