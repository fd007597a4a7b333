//! `vmwatch top`: the processes of a VM in a full-screen table, now and in the past.
//!
//! ```text
//! keys ──┐
//! events ├─> loop ─> state (no I/O) ─> view
//! loads ─┘
//! ```

mod columns;
mod fetch;
mod rows;
mod screen;
mod state;
mod view;

use std::{
    cell::Cell,
    io::{self, IsTerminal as _},
    pin::pin,
    time::Duration,
};

use crossterm::event::{Event, EventStream, KeyEventKind};
use futures::{FutureExt as _, StreamExt as _, future::LocalBoxFuture};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{MissedTickBehavior, interval, sleep},
};
use vmwatch_api::InstanceId;

use self::{
    fetch::{Load, Snapshot, load},
    screen::Screen,
    state::{Outcome, State},
    view::Theme,
};
use crate::{
    args::Top,
    client::Client,
    error::CliError,
    output::Output,
    sse::{Follower, Received},
    vm::find_vm,
};

/// Interval at which ages are drawn again and new tables are loaded.
const TICK: Duration = Duration::from_secs(1);

/// Wait after a first connection for live events that failed.
const RETRY: Duration = Duration::from_secs(10);

/// A load that is in progress, and its result.
type Loading<'a> = LocalBoxFuture<'a, (Load, Result<Option<Snapshot>, CliError>)>;

/// What the reader of live events has found since the last tick.
#[derive(Default)]
struct News {
    has_table: Cell<bool>,
    /// Why the connection is lost; `None` if it is not.
    lost: Cell<Option<String>>,
    is_changed: Cell<bool>,
}

pub(crate) async fn run(args: &Top, client: &Client, output: &Output) -> Result<(), CliError> {
    if output.json || !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        let text = "top needs a terminal; `vmwatch ps` lists the processes of a moment";
        return Err(CliError::Usage(text.to_owned()));
    }
    let first = match output.moment(args.at.as_deref())? {
        Some(at) => Load::At(at),
        None => Load::Live,
    };
    let vm = find_vm(client, &args.vm).await?;
    let state = State::new(vm);
    let screen = Screen::open()?;
    watch(state, screen, first, client, output).await
}

/// Draws and handles keys until the user quits or the terminal is closed.
async fn watch(
    mut state: State,
    mut screen: Screen,
    first: Load,
    client: &Client,
    output: &Output,
) -> Result<(), CliError> {
    let id = state.vm.instance_id.clone();
    let theme = Theme {
        colours: output.colours,
    };
    let news = News::default();
    let mut following = pin!(follow(client, &id, &news));
    let mut keys = EventStream::new();
    let mut hangup = signal(SignalKind::hangup()).map_err(CliError::Terminal)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(CliError::Terminal)?;
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut loading: Option<Loading<'_>> = Some(begin(client, &id, first, &mut state));
    loop {
        if let Err(error) = screen.draw(|frame| view::draw(frame, &mut state, theme, &output.now())) {
            return if Screen::exists() { Err(error) } else { Ok(()) };
        }
        tokio::select! {
            biased;
            _ = hangup.recv() => return Ok(()),
            _ = terminate.recv() => return Ok(()),
            event = keys.next() => {
                let Some(Ok(event)) = event else { return Ok(()) };
                match press(&mut state, &event, output) {
                    Outcome::Nothing => {}
                    Outcome::Quit => return Ok(()),
                    // The same key again, before its first load has ended.
                    Outcome::Load(what) if state.loading == Some(what) => {}
                    Outcome::Load(what) => loading = Some(begin(client, &id, what, &mut state)),
                }
            }
            (what, result) = finished(&mut loading) => {
                loading = None;
                state.loaded(what, result);
            }
            error = &mut following => return Err(error),
            _ = tick.tick() => {
                if !Screen::exists() {
                    return Ok(());
                }
                if news.is_changed.take() {
                    state.lost = news.lost.take();
                }
                if loading.is_none() && state.is_live && news.has_table.take() {
                    loading = Some(begin(client, &id, Load::Live, &mut state));
                }
            }
        }
    }
}

/// Begins a load. Replacing the future of another load ends that one.
fn begin<'a>(client: &'a Client, id: &'a InstanceId, what: Load, state: &mut State) -> Loading<'a> {
    state.loading = Some(what);
    async move { (what, load(client, id, what).await) }.boxed_local()
}

async fn finished(loading: &mut Option<Loading<'_>>) -> (Load, Result<Option<Snapshot>, CliError>) {
    match loading {
        Some(loading) => loading.await,
        None => std::future::pending().await,
    }
}

fn press(state: &mut State, event: &Event, output: &Output) -> Outcome {
    match event {
        Event::Key(key) if key.kind != KeyEventKind::Release => state.press(*key, &output.now()),
        // A resized terminal is drawn again in any case.
        _ => Outcome::Nothing,
    }
}

/// Follows the live events of the VM until one is final, such as the end of the session.
async fn follow(client: &Client, id: &InstanceId, news: &News) -> CliError {
    let query = vec![
        ("instance_id", Some(id.to_string())),
        ("kind", Some("processes,sample,machine".to_owned())),
    ];
    let mut follower = Follower::new(client, query.clone());
    loop {
        match follower.next().await {
            Ok(Received::Lost(reason)) => {
                news.lost
                    .set(Some(format!("live events are not received: {reason}")));
                news.is_changed.set(true);
            }
            Ok(Received::Connected | Received::Missed) => {
                news.lost.set(None);
                news.is_changed.set(true);
                news.has_table.set(true);
            }
            // A VM without an agent has no process tables, so its samples also cause a load.
            Ok(Received::Event(_)) => news.has_table.set(true),
            // The first connection failed, for example because the user has too many of them.
            Err(error) if error.is_temporary() => {
                news.lost
                    .set(Some(format!("live events are not received: {error}")));
                news.is_changed.set(true);
                sleep(RETRY).await;
                follower = Follower::new(client, query.clone());
            }
            Err(error) => return error,
        }
    }
}
