//! The alerts of one VM: those that hold now, those of the time range, and their marks on the charts.
import { useEffect, useMemo, useState } from "preact/hooks";
import { bySeverity, isActive, spanOf, withChanges, type Severity } from "../../alerts";
import { api, ask, type Alert } from "../../api/client";
import { onEvent } from "../../api/live";
import { useEvery, useResource } from "../../api/resource";
import { MINUTE } from "../../format";
import { t } from "../../i18n";
import { AlertCard } from "../alerts/card";
import { SilenceDialog } from "../alerts/silence-dialog";
import { type Range, RANGES } from "./range";

const REFRESH_MS = MINUTE;
/** Maximum number of alerts that hold now, and of resolved ones, that are read. */
const MAX_READ = 200;
/** Alerts that are shown above the charts. */
const MAX_SHOWN = 3;

/** A time during which an alert held, for a chart. */
export interface Mark {
  from: number;
  /** Infinite while the alert still holds. */
  to: number;
  severity: Severity;
  text: string;
  /** The chart of the measure that the alert is about; undefined for an alert that has no chart of its own. */
  chart: string | undefined;
}

export interface VmAlerts {
  active: Alert[];
  /** The resolved alerts that held in the time range, the newest first. */
  past: Alert[];
  marks: Mark[];
  change: (alert: Alert) => void;
}

export function useVmAlerts(id: string, range: Range): VmAlerts {
  const time = range.live ? range.name : `${range.from} ${range.to}`;
  const read = useResource(
    async (signal) => {
      const to = range.live ? Date.now() : range.to;
      const from = range.live ? to - RANGES[range.name] : range.from;
      const list = (query: object) =>
        ask(api.GET("/api/v1/alerts", { params: { query: { instance_id: id, limit: MAX_READ, ...query } }, signal }));
      const [current, past] = await Promise.all([
        list({}), list({ state: "resolved", from: new Date(from).toISOString(), to: new Date(to).toISOString() }),
      ]);
      return [...current.alerts, ...past.alerts];
    },
    [id, time],
  );
  useEvery(REFRESH_MS, read.reload);
  const [changes, setChanges] = useState<ReadonlyMap<string, Alert>>(new Map());
  const change = (alert: Alert) => setChanges((all) => new Map(all).set(alert.id, alert));
  useEffect(() => onEvent("alert", (alert) => alert.instance_id === id && change(alert)), [id]);
  useEffect(() => setChanges(new Map()), [read.data]);
  return useMemo(() => {
    const alerts = withChanges(read.data ?? [], changes);
    const past = alerts.filter(({ state }) => state === "resolved");
    return {
      active: bySeverity(alerts.filter(isActive)),
      past: past.sort((one, other) => other.since.localeCompare(one.since)),
      marks: alerts.filter(({ state }) => state !== "pending").map(markOf),
      change,
    };
  }, [read.data, changes]);
}

function markOf(alert: Alert): Mark {
  const { severity, rule_name, subject } = alert;
  return { ...spanOf(alert, Infinity), severity, text: [rule_name, subject].filter(Boolean).join(" "), chart: chartOf(alert) };
}

/** The chart that shows what the alert is about. */
function chartOf({ condition }: Alert): string | undefined {
  if (condition.kind === "process_cpu") return "cpu";
  if (condition.kind === "process_mem") return "mem";
  if (condition.kind === "filesystem") return "disk";
  if (condition.kind !== "measure") return undefined;
  const { measure } = condition;
  if (measure === "steal" || measure === "cpu_util") return "cpu";
  if (measure === "swap") return "mem";
  if (measure === "cores") return "load";
  return /^(net|disk|pressure|load|mem)/.exec(measure)?.[0];
}

/** The alerts that hold now, above the charts. */
export function AlertNotes({ id, alerts: { active, change } }: { id: string; alerts: VmAlerts }) {
  const [silencing, setSilencing] = useState<Alert | null>(null);
  if (active.length === 0) return null;
  return (
    <section class="vm-alerts" aria-label={t().alerts.title}>
      <ul class="cards alerts">
        {active.slice(0, MAX_SHOWN).map((alert) => <AlertCard key={alert.id} alert={alert} hidesVm changed={change} silence={setSilencing} />)}
      </ul>
      {active.length > MAX_SHOWN && <a href={`/alerts?vm=${id}`}>{t().alerts.vms.all(active.length)}</a>}
      {silencing && <SilenceDialog alert={silencing} close={() => setSilencing(null)} />}
    </section>
  );
}

/** The resolved alerts of the time range, below the charts. */
export function PastAlerts({ alerts: { past, marks } }: { alerts: VmAlerts }) {
  const texts = t().alerts.vms;
  if (marks.length === 0) return null;
  return (
    <div class="past-alerts small">
      <p class="faint">{texts.marks}</p>
      {past.length > 0 && (
        <details>
          <summary>{texts.past(past.length)}</summary>
          <ul class="cards alerts">{past.map((alert) => <AlertCard key={alert.id} alert={alert} hidesVm />)}</ul>
        </details>
      )}
    </div>
  );
}
