//! The firing alerts of all VMs, kept up to date with live events, and what other views need to know about an alert.
import { computed, signal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { api, ask, me, may, type Alert, type Schemas } from "./api/client";
import { onEvent } from "./api/live";
import { useEvery, useResource } from "./api/resource";
import { MINUTE, SECOND, ms } from "./format";
import { vmAddress } from "./router";

export type Severity = Schemas["Severity"];
export type AlertState = Schemas["AlertState"];

export const SEVERITIES: Severity[] = ["critical", "warning", "info"];
/** Maximum number of firing alerts that are read, which is the largest page of the API. */
const MAX_FIRING = 1000;
/** The alerts are read again at this interval: live events arrive only for the VMs that a view shows. */
const REFRESH_MS = 15 * SECOND;

interface Firing {
  alerts: ReadonlyMap<string, Alert>;
  /** Whether there are more than could be read. */
  isCut: boolean;
}

/** The firing alerts; undefined until they have been read. */
export const firing = signal<Firing | undefined>(undefined);

/** The firing alerts of each VM, the most severe first. */
export const firingByVm = computed<ReadonlyMap<string, Alert[]>>(() => {
  const byVm = new Map<string, Alert[]>();
  for (const alert of bySeverity(firing.value?.alerts.values() ?? [])) {
    if (alert.instance_id === null) continue;
    const alerts = byVm.get(alert.instance_id);
    if (alerts) alerts.push(alert);
    else byVm.set(alert.instance_id, [alert]);
  }
  return byVm;
});

const rank = (severity: Severity): number => (SEVERITIES.indexOf(severity) + SEVERITIES.length + 1) % (SEVERITIES.length + 1);

/** Sorts the most severe first, then the newest. */
export const bySeverity = (alerts: Iterable<Alert>): Alert[] =>
  [...alerts].sort((one, other) => rank(one.severity) - rank(other.severity) || other.since.localeCompare(one.since));

/** Whether the condition holds and has held for the duration of the rule. */
export const isActive = ({ state }: Alert): boolean => state === "firing" || state === "acknowledged";

/** Reads the firing alerts with one request, and follows live events. */
export function useFiring(): void {
  // Changes that arrived while an answer was on its way, which may be older than they are.
  const changed = useRef(new Map<string, Alert>());
  const read = useResource(async (signal) => {
    changed.current.clear();
    const query = { state: "firing" as const, limit: MAX_FIRING };
    return ask(api.GET("/api/v1/alerts", { params: { query }, signal }));
  }, []);
  useEffect(() => {
    if (!read.data) return;
    const alerts = new Map(read.data.alerts.map((alert) => [alert.id, alert]));
    for (const alert of changed.current.values()) apply(alerts, alert);
    firing.value = { alerts, isCut: read.data.next !== null };
  }, [read.data]);
  useEffect(() => onEvent("alert", (alert) => {
    changed.current.set(alert.id, alert);
    const known = firing.peek();
    if (!known) return;
    const alerts = new Map(known.alerts);
    apply(alerts, alert);
    firing.value = { ...known, alerts };
  }), []);
  useEvery(REFRESH_MS, read.reload);
  useEffect(() => () => void (firing.value = undefined), []);
}

/** Applies a change, unless a newer one is known. */
function apply(alerts: Map<string, Alert>, alert: Alert): void {
  if ((alerts.get(alert.id)?.revision ?? -1) > alert.revision) return;
  if (alert.state === "firing") alerts.set(alert.id, alert);
  else alerts.delete(alert.id);
}

/** Merges changes into alerts that were read; the newest revision of each alert remains. */
export function withChanges(read: Iterable<Alert>, changes: ReadonlyMap<string, Alert>): Alert[] {
  const all = new Map(changes);
  for (const alert of read) {
    const change = all.get(alert.id);
    if (!change || change.revision < alert.revision) all.set(alert.id, alert);
  }
  return [...all.values()];
}

export async function acknowledge(id: string): Promise<Alert> {
  return ask(api.PUT("/api/v1/alerts/{id}/acknowledgement", { params: { path: { id } } }));
}

/** Whether the user may change rules and silences, which concern all VMs. */
export const mayManage = (): boolean => may("operator") && me.value?.scope === "all";

/** The labels that a silence compares. */
export function labelsOf(alert: Alert): Record<string, string> {
  const { labels, rule_name, severity, instance_id, vm_name, hypervisor, subject } = alert;
  const own = { rule: rule_name, severity, instance_id, vm_name, hypervisor, subject };
  const known = Object.entries(own).filter((label): label is [string, string] => Boolean(label[1]));
  return { ...labels, ...Object.fromEntries(known) };
}

/** Whether a silence holds now for an alert with these labels. */
export function isSilenced(labels: Record<string, string>, silences: Schemas["Silence"][], now: number): boolean {
  return silences.some(({ matchers, from, to }) =>
    ms(from) <= now && now < ms(to) && Object.entries(matchers).every(([name, value]) => labels[name] === value));
}

/** When the alert was, or has been until now, firing. */
export function spanOf({ since, fired_at, resolved_at }: Pick<Alert, "since" | "fired_at" | "resolved_at">, now: number): { from: number; to: number } {
  return { from: ms(fired_at ?? since), to: resolved_at === null ? now : ms(resolved_at) };
}

/** The address of the VM's view at the moment at which the alert fired; with the history of a process if one is named. */
export function momentAddress(alert: Alert & { instance_id: string }, process?: { name: string; pid: number | null }): string {
  const { from } = spanOf(alert, Date.now());
  // The samples that completed the condition are those at the end of the time range that was examined.
  const at = alert.culprits && !alert.culprits.last_known ? ms(alert.culprits.to) : from;
  const text = (time: number) => new Date(time).toISOString();
  const query = new URLSearchParams({
    range: "1h", from: text(at - 50 * MINUTE), to: text(Math.max(at, Math.min(at + 10 * MINUTE, Date.now()))), at: text(at),
  });
  if (process) query.set("process", process.name);
  if (process?.pid) query.set("pid", String(process.pid));
  return `${vmAddress(alert.instance_id)}?${query.toString()}`;
}
