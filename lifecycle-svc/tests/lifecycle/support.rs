//! Helpers of the lifecycle tests: a NATS server, replicas of lifecycle-svc, and callers.

use std::{path::Path, time::Duration};

use tempfile::TempDir;
use testkit::{Nats, PATIENCE, Process, Spec, eventually};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use vmwatch_api::{
    InstanceId, Method, Principal, Role, Scope, Service,
    audit::AuditRecord,
    lifecycle::{
        ActionTarget, Machine, MachineState, Operation, OperationFilter, OperationId, OperationRef,
        OperationState, OperationsGet, OperationsList, Start, State,
    },
    metrics::Limit,
    vms::{ListWithoutMeasures, VmPage, VmQuery},
    wire::{Fault, FaultKind},
};
use vmwatch_bus::{
    Bus, Context,
    audit::{self, AuditSettings},
    provision::ensure_stream,
};
use vmwatch_service::config::Environment;

/// The user name that most tests use.
pub(crate) const USER: &str = "ann";
/// The lease time of test replicas. It is short, so that tests do not wait long until another replica adopts an
/// operation.
pub(crate) const LEASE: Duration = Duration::from_secs(2);

/// A NATS server, a temporary folder and a client that calls lifecycle-svc.
pub(crate) struct World {
    pub(crate) bus: Bus,
    pub(crate) nats: Nats,
    pub(crate) folder: TempDir,
}

impl World {
    pub(crate) async fn new() -> Self {
        let folder = tempfile::Builder::new()
            .prefix("vmwatch-lifecycle-")
            .tempdir()
            .unwrap();
        let nats = Nats::start(folder.path()).await;
        let bus = nats.connect("vmwatch-test").await;
        // Creates the audit streams like auth-svc, which owns them.
        let audit = AuditSettings::read(&Environment::from_variables([])).unwrap();
        for stream in audit.streams() {
            ensure_stream(&bus, Service::Auth, &stream).await.unwrap();
        }
        Self { bus, nats, folder }
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Starts a replica of lifecycle-svc and waits until it is ready. `settings` override the settings that all tests
    /// share.
    pub(crate) async fn replica(&self, name: &str, settings: &[(&str, &str)]) -> Replica {
        let replica = self.spawn(name, settings);
        replica.ready().await;
        replica
    }

    /// Starts a replica without waiting until it is ready.
    pub(crate) fn spawn(&self, name: &str, settings: &[(&str, &str)]) -> Replica {
        let lease = format!("{}ms", LEASE.as_millis());
        let common = [
            ("VMWATCH_NATS_URL", self.nats.url()),
            ("VMWATCH_NATS_PING_INTERVAL", "300ms"),
            ("VMWATCH_HEALTH_LISTEN", "127.0.0.1:0"),
            ("VMWATCH_OPERATION_LEASE", &lease),
            // Tests send a hundred concurrent requests as one user.
            ("VMWATCH_MAX_COMMANDS", "1024"),
            ("RUST_BACKTRACE", "1"),
        ];
        let env = common
            .iter()
            .chain(settings)
            .map(|&(name, value)| (name.to_owned(), value.to_owned()));
        Replica(Process::start(Spec {
            name: name.to_owned(),
            program: env!("CARGO_BIN_EXE_vmwatch-lifecycle").into(),
            args: Vec::new(),
            env: env.collect(),
            log: self.path().join(format!("{name}.log")),
        }))
    }

    /// Runs vmwatch-lifecycle with these arguments. Returns whether it succeeded, its standard output, and its standard
    /// error.
    pub(crate) fn command(&self, arguments: &[&str]) -> (bool, String, String) {
        self.command_with(arguments, &[])
    }

    /// Does the same as [`World::command`], with additional settings.
    pub(crate) fn command_with(
        &self,
        arguments: &[&str],
        settings: &[(&str, &str)],
    ) -> (bool, String, String) {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_vmwatch-lifecycle"))
            .args(arguments)
            .env("VMWATCH_NATS_URL", self.nats.url())
            .envs(settings.iter().copied())
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.success(), text(output.stdout), text(output.stderr))
    }

    pub(crate) async fn start(&self, context: &Context, id: &str) -> Result<MachineState, Fault> {
        self.bus
            .call::<Start>(context, &target(id))
            .await
            .map(|machine: Machine| machine.state)
    }

    /// Sends a start request once a service has subscribed, and returns the fault in its answer.
    pub(crate) async fn refused_start(&self, context: &Context, id: &str) -> Fault {
        eventually("a service refuses the start", PATIENCE, async || {
            match self.start(context, id).await {
                Err(fault) if fault.kind != FaultKind::Unavailable => Ok(fault),
                other => Err(format!("{other:?}")),
            }
        })
        .await
    }

    pub(crate) async fn state(&self, id: &str) -> Result<MachineState, Fault> {
        self.bus
            .call::<State>(&operator(), &target(id))
            .await
            .map(|machine| machine.state)
    }

    pub(crate) async fn operation(&self, id: &OperationId) -> Result<Operation, Fault> {
        let which = OperationRef {
            operation_id: id.clone(),
        };
        self.bus.call::<OperationsGet>(&operator(), &which).await
    }

    /// Waits until the operation has ended, and returns it.
    pub(crate) async fn ended(&self, id: &OperationId) -> Operation {
        eventually("the operation has ended", PATIENCE, async || {
            match self.operation(id).await {
                Ok(operation) if operation.state.is_final() => Ok(operation),
                Ok(operation) => Err(format!("{operation:?}")),
                Err(fault) => Err(fault.to_string()),
            }
        })
        .await
    }

    pub(crate) async fn operations(&self, context: &Context, instance: Option<&str>) -> Vec<Operation> {
        let filter = OperationFilter {
            instance_id: instance.map(instance_id),
            state: None,
            before: None,
            limit: Limit::new(1000).unwrap(),
        };
        let page = self.bus.call::<OperationsList>(context, &filter).await.unwrap();
        page.operations
    }

    /// Lists VMs.
    pub(crate) async fn vms(&self, context: &Context, query: &VmQuery) -> VmPage {
        let listed = self.bus.call::<ListWithoutMeasures>(context, query).await;
        listed.unwrap()
    }

    /// Waits until this principal sees `count` operations and all have ended. The wait is needed because lists may be
    /// slightly out of date.
    pub(crate) async fn listed(
        &self,
        context: &Context,
        instance: Option<&str>,
        count: usize,
    ) -> Vec<Operation> {
        eventually("the list contains all ended operations", PATIENCE, async || {
            let all = self.operations(context, instance).await;
            let settled = all.len() == count && all.iter().all(|operation| operation.state.is_final());
            if settled { Ok(all) } else { Err(format!("{all:?}")) }
        })
        .await
    }

    /// Returns the audit records of an operation, oldest first.
    pub(crate) async fn audit_of(&self, id: &OperationId) -> Vec<AuditRecord> {
        let mut records = audit::newest(&self.bus, 1000).await.unwrap();
        records.retain(|record| record.operation_id.as_ref() == Some(id));
        records
    }
}

/// A process of lifecycle-svc.
pub(crate) struct Replica(pub(crate) Process);

impl Replica {
    /// Waits until the replica is ready.
    pub(crate) async fn ready(&self) {
        eventually(self.0.name(), PATIENCE, async || {
            assert_eq!(self.0.ended(), None, "lifecycle-svc ended:\n{}", self.0.log());
            self.readiness().await
        })
        .await;
    }

    /// Returns `Ok` if the replica is ready, or the reason why it is not.
    pub(crate) async fn readiness(&self) -> Result<(), String> {
        let answer = self.get("/readyz").await?;
        if answer.starts_with("HTTP/1.1 200") {
            Ok(())
        } else {
            Err(answer)
        }
    }

    /// Sends a request to the replica's health listener.
    pub(crate) async fn get(&self, path: &str) -> Result<String, String> {
        let log = self.0.log();
        // Uses the last address in the log, in case the process was restarted.
        let (_, after) = log
            .rsplit_once("address=127.0.0.1:")
            .ok_or("the health listener has not started")?;
        let port = after.split(char::is_whitespace).next().unwrap_or_default();
        let connected = TcpStream::connect(format!("127.0.0.1:{port}")).await;
        let mut stream = connected.map_err(|error| error.to_string())?;
        let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
        let answered = async {
            stream.write_all(request.as_bytes()).await?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await?;
            std::io::Result::Ok(answer)
        };
        answered.await.map_err(|error| error.to_string())
    }
}

pub(crate) fn instance_id(id: &str) -> InstanceId {
    id.parse().unwrap()
}

/// Returns the parameters of a method that is for one VM.
pub(crate) fn target<T: From<InstanceId>>(id: &str) -> T {
    instance_id(id).into()
}

/// Returns the parameters of an action that this hypervisor is to carry out.
pub(crate) fn target_on(id: &str, hypervisor: &str) -> ActionTarget {
    ActionTarget {
        hypervisor: Some(hypervisor.to_owned()),
        ..target(id)
    }
}

/// Returns the context of a user's request, with the default deadline of tests.
pub(crate) fn context(user: &str, role: Role, scope: Scope) -> Context {
    let mut context = within(PATIENCE);
    context.principal = Some(Principal {
        user: user.to_owned(),
        role,
        scope,
    });
    context
}

/// Returns the context of an operator's request without an idempotency key.
pub(crate) fn operator() -> Context {
    context(USER, Role::Operator, Scope::All)
}

/// Returns the context of an operator's request with this deadline.
pub(crate) fn within(limit: Duration) -> Context {
    let mut context = Context::new(limit);
    context.source = Some("192.0.2.7".to_owned());
    context.as_principal(Principal {
        user: USER.to_owned(),
        role: Role::Operator,
        scope: Scope::All,
    })
}

/// Returns the context of an operator's request with this idempotency key, and the id of the operation that the key
/// identifies.
pub(crate) fn keyed<M: Method>(limit: Duration, id: &str, key: &str) -> (Context, OperationId) {
    let mut context = within(limit);
    context.idempotency_key = Some(key.to_owned());
    (
        context,
        OperationId::from_idempotency_key(USER, &instance_id(id), &M::INFO, key),
    )
}

/// Returns the states that an operation went through.
pub(crate) fn states(operation: &Operation) -> Vec<OperationState> {
    operation.history.iter().map(|event| event.state).collect()
}
