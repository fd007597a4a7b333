//! A server that runs in a container and can be controlled like a [`Process`](crate::Process).

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

/// Container label with the test's process id. With it, deploy/offline/backend.py finds the containers of a killed
/// test.
const LABEL: &str = "vmwatch-e2e";
/// Number of log lines to print of each server when a test fails.
const TAIL: usize = 25;
/// Time limit of an operation. The container engine usually needs less than a second, but may first have to pull an
/// image.
const LIMIT: Duration = Duration::from_mins(2);

/// Describes how to run a container.
#[derive(Debug)]
pub(crate) struct ContainerSpec {
    /// The server's name in messages, such as `nats`.
    pub(crate) name: &'static str,
    /// The image in the form `name:tag`.
    pub(crate) image: String,
    /// Arguments for the entrypoint; if there are none, the image's own arguments are used.
    pub(crate) args: Vec<String>,
    /// The port on the host's loopback interface. The port remains the same across restarts.
    pub(crate) host_port: u16,
    /// The port inside the container.
    pub(crate) port: u16,
    /// Folders on the host that are mounted, each with its path inside the container.
    pub(crate) mounts: Vec<(String, &'static str)>,
}

/// A running container. Dropping it removes the container and its data.
#[derive(Debug)]
pub struct Container {
    name: &'static str,
    container: Option<Arc<ContainerAsync<GenericImage>>>,
}

impl Container {
    /// Starts a container. The container engine pulls the image if it is missing.
    pub(crate) fn start(spec: ContainerSpec) -> Self {
        let (name, image) = (spec.name, spec.image.clone());
        let container = run_blocking(async move { request(spec).start().await })
            .unwrap_or_else(|error| panic!("cannot start a container of {image}: {error}"));
        Self {
            name,
            container: Some(Arc::new(container)),
        }
    }

    /// Sends SIGKILL and waits until the container has ended.
    pub(crate) fn kill9(&self) {
        self.run_docker("kill", |container| async move {
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

    /// Freezes the container's processes.
    pub(crate) fn pause(&self) {
        self.run_docker("pause", |container| async move { container.pause().await });
    }

    /// Resumes the container after [`Container::pause`].
    pub(crate) fn resume(&self) {
        self.run_docker("unpause", |container| async move { container.unpause().await });
    }

    /// Sends SIGHUP to the container's main process.
    pub(crate) fn reload(&self) {
        self.run_docker("kill", |container| async move {
            let docker = docker_client_instance().await?;
            let signal = KillContainerOptionsBuilder::default().signal("SIGHUP").build();
            let sent = docker.kill_container(container.id(), Some(signal)).await;
            sent.map_err(|error| TestcontainersError::Other(error.into()))
        });
    }

    /// Restarts the ended container with the same data and port.
    pub(crate) fn start_again(&self) {
        self.run_docker("start", |container| async move { container.start().await });
    }

    /// The exit code, if the container has ended.
    pub(crate) fn ended(&self) -> Option<i64> {
        self.run_docker("inspect", |container| async move { container.exit_code().await })
    }

    /// The container's output so far: standard output first, then standard error.
    pub(crate) fn log(&self) -> String {
        let written = self.run_docker("logs", |container| async move {
            let mut written = container.stdout_to_vec().await?;
            written.extend(container.stderr_to_vec().await?);
            Ok(written)
        });
        String::from_utf8_lossy(&written).into_owned()
    }

    fn run_docker<T, Work>(
        &self,
        what: &str,
        work: impl FnOnce(Arc<ContainerAsync<GenericImage>>) -> Work,
    ) -> T
    where
        T: Send + 'static,
        Work: Future<Output = Result<T, TestcontainersError>> + Send + 'static,
    {
        let container = self
            .container
            .as_ref()
            .expect("the container exists until it is dropped");
        run_blocking(work(Arc::clone(container)))
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
                "---- last lines of the log of {}'s container:\n{}",
                self.name,
                tail.join("\n")
            );
        }
        let container = self.container.take();
        // Dropping this value removes the container, which must happen within an async runtime.
        run_blocking(async move { drop(container) });
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

/// Checks that a Docker engine is running and that it has the given images.
pub(crate) fn engine_has(images: &[String]) -> Result<(), String> {
    let images = images.to_vec();
    run_blocking(async move {
        let no_engine = |error: String| format!("no Docker engine is reachable ({error})");
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

/// Runs a future on a separate async runtime and blocks until it is done. The test's own runtime may have only one
/// thread, and `drop` cannot await.
fn run_blocking<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
        let mut builder = Builder::new_multi_thread();
        builder
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("starting an async runtime succeeds")
    });
    let (sender, result) = mpsc::sync_channel(1);
    RUNTIME.spawn(async move { sender.send(work.await) });
    result.recv_timeout(LIMIT).expect("the Docker engine timed out")
}
