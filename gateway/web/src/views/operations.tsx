//! View that lists the operations on VMs, newest first, updated live.
import { useEffect, useState } from "preact/hooks";
import { api, ask, type Operation, type Schemas } from "../api/client";
import { onEvent } from "../api/live";
import { duration, fullTime, ms, shortTime } from "../format";
import { t, textOf } from "../i18n";
import { OperationBadge } from "../parts/badge";
import { Failed, Loading, Notice } from "../parts/states";
import { adjust, route, vmAddress } from "../router";
import { usePages } from "../parts/pages";

type State = Schemas["OperationState"];

const STATES: State[] = ["requested", "running", "succeeded", "failed", "timed_out", "outcome_unknown"];

export function Operations() {
  const texts = t().operation;
  const state = STATES.find((known) => known === route.value.query.get("state"));
  const pages = usePages(
    async (cursor: string | undefined, signal) => {
      const query = { limit: 100, ...(state && { state }), ...(cursor !== undefined && { cursor }) };
      const { operations, next } = await ask(api.GET("/api/v1/operations", { params: { query }, signal }));
      return { items: operations, next: next ?? undefined };
    },
    [state],
  );
  const [updates, setUpdates] = useState(new Map<string, Operation>());
  useEffect(() => onEvent("operation", (operation) => setUpdates((all) => new Map(all).set(operation.id, operation))), []);
  useEffect(() => setUpdates(new Map()), [pages.turn]);
  const operations = withUpdates(pages.items, updates, state);
  return (
    <>
      <div class="heading">
        <h1 tabIndex={-1}>{texts.title}</h1>
        <div class="filters">
          <select
            aria-label={texts.state} value={state ?? ""}
            onChange={(event) => adjust({ state: event.currentTarget.value || null }, true)}
          >
            <option value="">{t().common.labelled(texts.state, t().vms.all)}</option>
            {STATES.map((known) => <option key={known} value={known}>{texts.states[known]}</option>)}
          </select>
        </div>
      </div>
      {!pages.loaded ? (
        pages.failure ? <Failed failure={pages.failure} retry={pages.reload} /> : <Loading />
      ) : operations.length === 0 ? (
        <Notice title={texts.emptyTitle}><p>{texts.empty}</p></Notice>
      ) : (
        <ul class="cards">
          {operations.map((operation) => <OperationCard key={operation.id} operation={operation} />)}
        </ul>
      )}
      {pages.next !== undefined && (
        <button type="button" class="more" disabled={pages.loading} onClick={pages.more}>{t().common.more}</button>
      )}
    </>
  );
}

/** Merges live updates into the operations that were read. */
function withUpdates(loaded: Operation[], updates: Map<string, Operation>, state: State | undefined): Operation[] {
  const all = new Map([...updates].reverse());
  for (const operation of loaded) if (!all.has(operation.id)) all.set(operation.id, operation);
  return [...all.values()]
    .filter((operation) => state === undefined || operation.state === state)
    .sort((one, other) => other.requested_at.localeCompare(one.requested_at));
}

/** An operation in one line; expands to show its steps. */
export function OperationCard({ operation, open = false }: { operation: Operation; open?: boolean }) {
  const texts = t().operation;
  const { confirm, confirmTitle, ...actions } = t().action;
  const action = textOf(actions, operation.action);
  const began = ms(operation.requested_at);
  const took = operation.finished_at && duration(ms(operation.finished_at) - began);
  return (
    <li>
      <details class="operation" open={open}>
        <summary>
          <OperationBadge state={operation.state} />
          <strong>{action}</strong>
          <a class="mono" href={vmAddress(operation.instance_id)}>{operation.instance_id}</a>
          <span class="faint">{operation.user}</span>
          <time class="faint" dateTime={operation.requested_at}>{shortTime(began)}</time>
          <span class="faint took">{took}</span>
        </summary>
        {operation.failure && <p class="problem">{operation.failure.detail}</p>}
        <ol class="steps">
          {operation.history.map((step) => (
            <li key={step.at + step.text}>
              <time class="faint" dateTime={step.at}>{fullTime(ms(step.at))}</time>
              <span>{textOf(texts.states, step.state)}</span>
              <span>{step.text}</span>
            </li>
          ))}
        </ol>
        <p class="faint small">
          {texts.id} <span class="mono">{operation.id}</span> · {texts.request}{" "}
          <span class="mono">{operation.request_id}</span>
          {operation.source && <> · {texts.source} <span class="mono">{operation.source}</span></>}
        </p>
      </details>
    </li>
  );
}
