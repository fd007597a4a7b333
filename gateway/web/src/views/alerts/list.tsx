//! View that lists alerts, updated live: those that are firing and acknowledged, or those of one state.
import { useEffect, useRef, useState } from "preact/hooks";
import { bySeverity, firing, isActive, SEVERITIES, withChanges, type AlertState, type Severity } from "../../alerts";
import { api, ask, may, type Alert } from "../../api/client";
import { onEvent } from "../../api/live";
import { useEvery, useResource } from "../../api/resource";
import { SECOND } from "../../format";
import { t } from "../../i18n";
import { usePages } from "../../parts/pages";
import { Failed, Loading, Notice } from "../../parts/states";
import { adjust, route } from "../../router";
import { AlertCard } from "./card";
import { SilenceDialog } from "./silence-dialog";
import { Tabs } from "./tabs";

const STATES: AlertState[] = ["firing", "acknowledged", "pending", "resolved"];
/** The states that are shown if none is selected. */
const ACTIVE: AlertState[] = ["firing", "acknowledged"];
const PAGE = 100;
const SILENCES_MS = 30 * SECOND;

interface Selection {
  state: AlertState | undefined;
  severity: Severity | undefined;
  vm: string;
}

/** The position in the list of each state that has further alerts. */
type Cursor = Partial<Record<AlertState, string>>;

export function Alerts() {
  const texts = t().alerts;
  const selection = selectionOf(route.value.query);
  const pages = useAlerts(selection);
  const silences = useSilences();
  const [silencing, setSilencing] = useState<Alert | null>(null);
  const isFiltered = selection.state !== undefined || selection.severity !== undefined || selection.vm !== "";
  const close = () => {
    setSilencing(null);
    silences.reload();
  };
  return (
    <>
      <div class="heading">
        <h1 tabIndex={-1}>{texts.title}</h1>
        {pages.loaded && <span class="count" role="status">{texts.count(pages.alerts.length, pages.next === undefined)}</span>}
        <Filters selection={selection} />
      </div>
      <Tabs />
      {pages.hasRecipients === false && <NoRecipients />}
      {!pages.loaded ? (
        pages.failure ? <Failed failure={pages.failure} retry={pages.reload} /> : <Loading />
      ) : pages.alerts.length > 0 ? (
        <ul class="cards alerts">
          {pages.alerts.map((alert) => (
            <AlertCard key={alert.id} alert={alert} silences={silences.data ?? []} changed={pages.change} silence={setSilencing} />
          ))}
        </ul>
      ) : isFiltered ? (
        <Notice title={texts.noMatchTitle}>
          <p>{texts.noMatch}</p>
          <button type="button" onClick={() => adjust({ state: null, severity: null, vm: null })}>{texts.showAll}</button>
        </Notice>
      ) : (
        <Notice title={texts.emptyTitle}><p>{texts.empty}</p></Notice>
      )}
      {pages.next !== undefined && (
        <button type="button" class="more" disabled={pages.loading} onClick={pages.more}>{t().common.more}</button>
      )}
      {silencing && <SilenceDialog alert={silencing} close={close} />}
    </>
  );
}

/** An alert alone, as notifications link to it. */
export function OneAlert({ id }: { id: string }) {
  const texts = t().alerts;
  const read = useResource((signal) => ask(api.GET("/api/v1/alerts/{id}", { params: { path: { id } }, signal })), [id]);
  const [change, setChange] = useState<Alert | undefined>(undefined);
  const silences = useSilences();
  const [silencing, setSilencing] = useState<Alert | null>(null);
  useEffect(() => onEvent("alert", (alert) => alert.id === id && setChange(alert)), [id]);
  const alert = change && change.revision > (read.data?.revision ?? -1) ? change : read.data;
  if (!alert) {
    if (read.failure?.status === 404) {
      return (
        <Notice title={texts.goneTitle} whole>
          <p>{texts.gone}</p>
          <a class="button" href="/alerts">{texts.back}</a>
        </Notice>
      );
    }
    return read.failure ? <Failed failure={read.failure} retry={read.reload} /> : <Loading rows={3} />;
  }
  const close = () => {
    setSilencing(null);
    silences.reload();
  };
  return (
    <>
      <div class="heading">
        <a class="back" href="/alerts" aria-label={texts.back} title={texts.back}>←</a>
        <h1 tabIndex={-1}>{alert.rule_name}</h1>
      </div>
      <ul class="cards alerts">
        <AlertCard alert={alert} silences={silences.data ?? []} changed={setChange} silence={setSilencing} open />
      </ul>
      {silencing && <SilenceDialog alert={silencing} close={close} />}
    </>
  );
}

function useSilences() {
  const silences = useResource(
    async (signal) => (await ask(api.GET("/api/v1/alert-silences", { signal }))).silences, [],
  );
  useEvery(SILENCES_MS, silences.reload);
  return silences;
}

function selectionOf(query: URLSearchParams): Selection {
  const known = <T extends string>(values: readonly T[], name: string) => values.find((value) => value === query.get(name));
  return { state: known(STATES, "state"), severity: known(SEVERITIES, "severity"), vm: idOf(query.get("vm") ?? "") };
}

/** The part of the input that is a valid id of a VM. */
const idOf = (input: string): string => input.replace(/[^0-9A-Za-z_-]/g, "").slice(0, 64);

/** Reads the alerts of each selected state page by page, and merges live events into them. */
function useAlerts({ state, severity, vm }: Selection) {
  const states = state ? [state] : ACTIVE;
  const pages = usePages(
    async (cursor: Cursor | undefined, signal) => {
      const wanted = states.filter((state) => !cursor || cursor[state] !== undefined);
      const read = await Promise.all(wanted.map((state) => {
        const after = cursor?.[state];
        const query = {
          state, limit: PAGE, ...(severity && { severity }), ...(vm && { instance_id: vm }), ...(after !== undefined && { cursor: after }),
        };
        return ask(api.GET("/api/v1/alerts", { params: { query }, signal }));
      }));
      const further = wanted.flatMap((state, index) => {
        const next = read[index]?.next ?? null;
        return next === null ? [] : [[state, next] as const];
      });
      return { items: read, next: further.length > 0 ? (Object.fromEntries(further) as Cursor) : undefined };
    },
    [state, severity, vm],
  );
  useReloadWithoutEvents(pages.reload);
  const [changes, setChanges] = useState<ReadonlyMap<string, Alert>>(new Map());
  const change = (alert: Alert) => setChanges((all) => new Map(all).set(alert.id, alert));
  useEffect(() => onEvent("alert", change), []);
  useEffect(() => setChanges(new Map()), [pages.turn]);
  const isSelected = (alert: Alert) =>
    (state ? alert.state === state : isActive(alert)) && (!severity || alert.severity === severity) && (!vm || alert.instance_id === vm);
  const alerts = withChanges(pages.items.flatMap((page) => page.alerts), changes).filter(isSelected);
  const hasRecipients = pages.items[0]?.has_recipients;
  return { ...pages, alerts: sorted(alerts, state), change, hasRecipients };
}

/** Reloads the list when alerts about vmwatch itself begin or end, which cause no live events. */
function useReloadWithoutEvents(reload: () => void): void {
  const alerts = [...(firing.value?.alerts.values() ?? [])].filter(({ instance_id }) => instance_id === null);
  const ids = alerts.map(({ id }) => id).sort().join();
  const known = useRef(ids);
  useEffect(() => {
    if (known.current !== ids) reload();
    known.current = ids;
  }, [ids]);
}

/** Firing alerts come before acknowledged ones; resolved alerts are sorted by time. */
function sorted(alerts: Alert[], state: AlertState | undefined): Alert[] {
  if (state === "resolved") return alerts.sort((one, other) => other.since.localeCompare(one.since));
  const all = bySeverity(alerts);
  return [...all.filter(({ state }) => state === "firing"), ...all.filter(({ state }) => state !== "firing")];
}

function NoRecipients() {
  const texts = t().alerts;
  return (
    <div class="banner warn no-recipients" role="status">
      <b>{texts.noRecipients}</b>
      {may("admin") ? <a href="/alerts/channels">{texts.noRecipientsAdmin}</a> : <span>{texts.noRecipientsOther}</span>}
    </div>
  );
}

function Filters({ selection }: { selection: Selection }) {
  const texts = t().alerts;
  const { labelled } = t().common;
  const [vm, setVm] = useState(selection.vm);
  useEffect(() => setVm(selection.vm), [selection.vm]);
  const send = (event: Event) => {
    event.preventDefault();
    adjust({ vm: idOf(vm) || null }, true);
  };
  const choose = (name: string) => (event: Event) => adjust({ [name]: (event.currentTarget as HTMLSelectElement).value || null }, true);
  return (
    <form class="filters" role="search" onSubmit={send} onChange={send}>
      <select aria-label={texts.stateLabel} value={selection.state ?? ""} onChange={choose("state")}>
        <option value="">{labelled(texts.stateLabel, texts.active)}</option>
        {STATES.map((state) => <option key={state} value={state}>{labelled(texts.stateLabel, texts.state[state])}</option>)}
      </select>
      <select aria-label={texts.severityLabel} value={selection.severity ?? ""} onChange={choose("severity")}>
        <option value="">{labelled(texts.severityLabel, t().vms.all)}</option>
        {SEVERITIES.map((severity) => (
          <option key={severity} value={severity}>{labelled(texts.severityLabel, texts.severity[severity])}</option>
        ))}
      </select>
      <input
        type="search" aria-label={texts.vm} placeholder={texts.vmHint} value={vm} maxLength={64} autocomplete="off" spellcheck={false}
        onInput={(event) => setVm(event.currentTarget.value)}
      />
    </form>
  );
}

