//! A server in a container, and all that a test may do to it: the same as to a [`Process`](crate::Process).

use std::{
    future::Future,
    process::id,
    sync::{Arc, LazyLock, mpsc},
    thread,
    time::Duration,
};

use testcontainers::{
    ContainerAsync, ContainerRequest, GenericImage, ImageExt, TestcontainersError,
    bollard::query_parameters::{KillContainerOptions, KillContainerOptionsBuilder},
    core::{ContainerPort, Mount, client::docker_client_instance},
    runners::AsyncRunner,
};
use tokio::runtime::{Builder, Runtime};

/// The label by which what a killed test left behind is found (deploy/offline/backend.py); its value is the test's
/// process id.
const LABEL: &str = "vmwatch-e2e";
/// The lines of each log that a failing test shows.
const TAIL: usize = 25;
/// An engine does each of these in a second, but an image may have to be pulled first.
const LIMIT: Duration = Duration::from_mins(2);

/// What to run.
#[derive(Debug)]
pub(crate) struct ContainerSpec {
    /// For people: `nats`.
    pub(crate) name: &'static str,
    /// `name:tag`.
    pub(crate) image: String,
    /// The arguments of its entrypoint; none for the image's own.
    pub(crate) args: Vec<String>,
    /// A port of the loopback interface, which it keeps over restarts.
    pub(crate) host_port: u16,
    /// Its own port.
    pub(crate) port: u16,
    /// Folders, and where they are in the container.
    pub(crate) mounts: Vec<(String, &'static str)>,
}

/// A running container. It is removed with this value, its store with it.
#[derive(Debug)]
pub struct Container {
    name: &'static str,
    container: Option<Arc<ContainerAsync<GenericImage>>>,
}

impl Container {
    /// Starts it; its image is pulled where the engine does not have it.
    pub(crate) fn start(spec: ContainerSpec) -> Self {
        let (name, image) = (spec.name, spec.image.clone());
        let container = apart(async move { request(spec).start().await })
            .unwrap_or_else(|error| panic!("no container of {image}: {error}"));
        Self {
            name,
            container: Some(Arc::new(container)),
        }
    }

    /// SIGKILL; waits for the end.
    pub(crate) fn kill9(&self) {
        self.done("kill", |container| async move {
            let docker = docker_client_instance().await?;
            let killed = docker
                .kill_container(container.id(), None::<KillContainerOptions>)
                .await;
            killed.map_err(|error| TestcontainersError::Other(error.into()))?;
            while container.is_running().await? {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Ok(())
        });
    }

    /// Freezes all its processes.
    pub(crate) fn pause(&self) {
        self.done("pause", |container| async move { container.pause().await });
    }

    /// Ends a pause.
    pub(crate) fn resume(&self) {
        self.done("unpause", |container| async move { container.unpause().await });
    }

    /// SIGHUP.
    pub(crate) fn reload(&self) {
        self.done("kill", |container| async move {
            let docker = docker_client_instance().await?;
            let signal = KillContainerOptionsBuilder::default().signal("SIGHUP").build();
            let sent = docker.kill_container(container.id(), Some(signal)).await;
            sent.map_err(|error| TestcontainersError::Other(error.into()))
        });
    }

    /// Starts it again, with its store and port, after it has ended.
    pub(crate) fn start_again(&self) {
        self.done("start", |container| async move { container.start().await });
    }

    /// Its exit code, if it has ended.
    pub(crate) fn ended(&self) -> Option<i64> {
        self.done("inspect", |container| async move { container.exit_code().await })
    }

    /// What it has written so far, standard output first.
    pub(crate) fn log(&self) -> String {
        let written = self.done("logs", |container| async move {
            let mut written = container.stdout_to_vec().await?;
            written.extend(container.stderr_to_vec().await?);
            Ok(written)
        });
        String::from_utf8_lossy(&written).into_owned()
    }

    fn done<T, Work>(&self, what: &str, work: impl FnOnce(Arc<ContainerAsync<GenericImage>>) -> Work) -> T
    where
        T: Send + 'static,
        Work: Future<Output = Result<T, TestcontainersError>> + Send + 'static,
    {
        let container = self.container.as_ref().expect("it is there until it is dropped");
        apart(work(Arc::clone(container)))
            .unwrap_or_else(|error| panic!("docker {what} {}: {error}", self.name))
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if thread::panicking() {
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            let tail = &lines[lines.len().saturating_sub(TAIL)..];
            eprintln!(
                "---- the end of the log of {}'s container:\n{}",
                self.name,
                tail.join("\n")
            );
        }
        let container = self.container.take();
        // Removed where it is dropped, which is within a runtime.
        apart(async move { drop(container) });
    }
}

fn request(spec: ContainerSpec) -> ContainerRequest<GenericImage> {
    let (name, tag) = spec.image.rsplit_once(':').unwrap_or((&spec.image, "latest"));
    let mut request = GenericImage::new(name, tag)
        .with_mapped_port(spec.host_port, ContainerPort::Tcp(spec.port))
        .with_label(LABEL, id().to_string())
        .with_host_config_modifier(|host| {
            for binding in host
                .port_bindings
                .iter_mut()
                .flatten()
                .filter_map(|(_, ports)| ports.as_mut())
                .flatten()
            {
                binding.host_ip = Some("127.0.0.1".to_owned());
            }
        });
    if !spec.args.is_empty() {
        request = request.with_cmd(spec.args);
    }
    spec.mounts.into_iter().fold(request, |request, (from, to)| {
        request.with_mount(Mount::bind_mount(from, to))
    })
}

/// Whether a Docker engine answers, and has these images.
pub(crate) fn engine_has(images: &[String]) -> Result<(), String> {
    let images = images.to_vec();
    apart(async move {
        let no_engine = |error: String| format!("no Docker engine answers ({error})");
        let docker = docker_client_instance()
            .await
            .map_err(|error| no_engine(error.to_string()))?;
        docker
            .ping()
            .await
            .map_err(|error| no_engine(error.to_string()))?;
        for image in images {
            let found = docker.inspect_image(&image).await;
            found.map_err(|_| format!("the Docker engine has no image {image}"))?;
        }
        Ok(())
    })
}

/// Runs something on a runtime of its own and waits for it: the runtime of a test may have one thread alone, and a
/// container is dropped where nothing can be awaited.
fn apart<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
        let mut builder = Builder::new_multi_thread();
        builder
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a thread can be started")
    });
    let (done, result) = mpsc::sync_channel(1);
    RUNTIME.spawn(async move { done.send(work.await) });
    result
        .recv_timeout(LIMIT)
        .expect("the Docker engine answers in time")
}
