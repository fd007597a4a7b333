//! Reads what explains an alert from metrics-svc and lifecycle-svc.

use vmwatch_api::{
    InstanceId, Method, Principal, Role, Scope, Service,
    alerts::{
        Alert, EndedBy,
        culprits::{CULPRITS, Culprits, ProcessTop, TopMeasure, TopQuery, TopReply},
    },
    lifecycle::{Operation, OperationFilter, OperationsList},
    metrics::Limit,
    processes::{ProcessName, ProcessSort, ProcessesAt, ProcessesAtQuery},
    wire::{Fault, FaultKind},
};
use vmwatch_bus::{Bus, Context};

use super::{
    LIMIT,
    search::{Search, Window, search},
};

/// Number of a VM's last operations among which one is looked for.
const LAST_OPERATIONS: u64 = 20;
const PARTIAL: &str = "the VM has too many process rows to read the whole time range; only its end was read";

/// Finds what explains an alert. If a service does not answer, the answer says so.
pub(super) async fn fetch(bus: &Bus, alert: &Alert, window: Window) -> Culprits {
    let Some(instance_id) = &alert.instance_id else {
        return window.nothing();
    };
    let fetch = Fetch { bus, instance_id };
    let found = match search(alert) {
        Search::Top(measure, note) => fetch.top(window, measure).await.map(|culprits| Culprits {
            problem: culprits.problem.or(note.map(str::to_owned)),
            ..culprits
        }),
        Search::Named(name, measure) => fetch.named(window, name, measure).await,
        Search::LastKnown => fetch.last_known_and_operation(window).await,
        Search::FailedOperation => fetch
            .operation(|one| one.state.is_failure())
            .await
            .map(|operation| Culprits {
                operation,
                ..window.nothing()
            }),
        Search::Nothing => Ok(window.nothing()),
    };
    found.unwrap_or_else(|fault| Culprits {
        problem: Some(problem(&fault)),
        ..window.nothing()
    })
}

fn problem(fault: &Fault) -> String {
    format!("not everything could be read: {}", fault.message)
}

/// Reads about one VM.
struct Fetch<'a> {
    bus: &'a Bus,
    instance_id: &'a InstanceId,
}

impl Fetch<'_> {
    /// The processes that used the most in the window, or the last known ones if the window has no sample of processes.
    async fn top(&self, window: Window, measure: TopMeasure) -> Result<Culprits, Fault> {
        let reply = self.used(window, measure, None).await?;
        if reply.samples == 0 {
            return self.last_known(window, measure).await;
        }
        Ok(culprits(window, measure, reply))
    }

    /// The processes with a name.
    async fn named(&self, window: Window, name: ProcessName, measure: TopMeasure) -> Result<Culprits, Fault> {
        let reply = self.used(window, measure, Some(name)).await?;
        let found = culprits(window, measure, reply);
        let nothing = found.processes.is_empty() && found.problem.is_none();
        Ok(Culprits {
            problem: nothing
                .then(|| "no process with this name was sampled in this time".to_owned())
                .or(found.problem),
            ..found
        })
    }

    /// The processes of the last sample before the end of the window.
    async fn last_known(&self, window: Window, measure: TopMeasure) -> Result<Culprits, Fault> {
        let query = ProcessesAtQuery {
            instance_id: self.instance_id.clone(),
            at_ms: Some(window.to_ms),
            sort: ProcessSort::Cpu,
            order: None,
            name: None,
            limit: Limit::ONE,
            after: None,
        };
        let table = self.call::<ProcessesAt>(&query).await?;
        let Some(at_ms) = table.at_ms else {
            return Ok(Culprits {
                problem: Some("no processes of this VM are stored".to_owned()),
                ..window.nothing()
            });
        };
        let sample = Window {
            from_ms: at_ms,
            to_ms: at_ms.saturating_add(1),
        };
        let reply = self.used(sample, measure, None).await?;
        Ok(Culprits {
            last_known: true,
            ..culprits(sample, measure, reply)
        })
    }

    /// The last known processes and the last operation. If one of them cannot be read, the other is returned nevertheless.
    async fn last_known_and_operation(&self, window: Window) -> Result<Culprits, Fault> {
        let (processes, operation) =
            tokio::join!(self.last_known(window, TopMeasure::Cpu), self.operation(|_| true));
        let mut culprits = processes.unwrap_or_else(|fault| Culprits {
            problem: Some(problem(&fault)),
            ..window.nothing()
        });
        match operation {
            Ok(operation) => culprits.operation = operation,
            Err(fault) => culprits.problem = Some(problem(&fault)),
        }
        Ok(culprits)
    }

    async fn used(
        &self,
        window: Window,
        measure: TopMeasure,
        name: Option<ProcessName>,
    ) -> Result<TopReply, Fault> {
        let limit = u16::try_from(CULPRITS).unwrap_or(u16::MAX);
        let invalid = || Fault::new(FaultKind::Invalid, "the time of the alert is invalid");
        let range = window.range().ok_or_else(invalid)?;
        let mut query =
            TopQuery::new(self.instance_id.clone(), range, measure, limit).map_err(|_| invalid())?;
        query.name = name;
        self.call::<ProcessTop>(&query).await
    }

    /// The newest of the VM's last operations that fulfils the condition.
    async fn operation(&self, is_meant: fn(&Operation) -> bool) -> Result<Option<EndedBy>, Fault> {
        let last = OperationFilter {
            instance_id: Some(self.instance_id.clone()),
            limit: Limit::new(LAST_OPERATIONS).unwrap_or_default(),
            ..OperationFilter::default()
        };
        let page = self.call::<OperationsList>(&last).await?;
        Ok(page.operations.into_iter().find(is_meant).map(summary))
    }

    async fn call<M: Method>(&self, params: &M::Params) -> Result<M::Reply, Fault> {
        let principal = Principal {
            user: Service::Alert.name().to_owned(),
            role: Role::Viewer,
            scope: Scope::All,
        };
        let context = Context::new(LIMIT).as_principal(principal);
        self.bus.call::<M>(&context, params).await
    }
}

fn culprits(window: Window, measure: TopMeasure, reply: TopReply) -> Culprits {
    Culprits {
        measure,
        processes: reply.processes,
        problem: reply.partial.then(|| PARTIAL.to_owned()),
        ..window.nothing()
    }
}

fn summary(operation: Operation) -> EndedBy {
    EndedBy {
        operation_id: operation.id,
        action: operation.verb.as_str().to_owned(),
        user: operation.user,
    }
}
