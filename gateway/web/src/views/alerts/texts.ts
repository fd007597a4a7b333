//! Texts for the conditions of rules and the values of alerts.
import type { Schemas } from "../../api/client";
import { SECOND, duration, percent, rate, tenths, whole } from "../../format";
import { t, textOf } from "../../i18n";

export type Condition = Schemas["Condition"];
export type Threshold = Schemas["Threshold"];

export type Unit = "percent" | "rate" | "count" | "load" | "core";

/** The unit of each measure of VMs. */
export const MEASURE_UNITS = {
  cpu_util: "percent",
  mem: "percent",
  load: "load",
  swap: "percent",
  steal: "percent",
  pressure_cpu: "percent",
  pressure_mem: "percent",
  pressure_io: "percent",
  disk_read: "rate",
  disk_write: "rate",
  net_incoming: "rate",
  net_outgoing: "rate",
  proc: "count",
  cores: "count",
} as const satisfies Record<Exclude<keyof Schemas["Bucket"], "at" | "count">, Unit>;

export type Measure = keyof typeof MEASURE_UNITS;
export const MEASURES = Object.keys(MEASURE_UNITS) as Measure[];

const unitOfMeasure = (name: string): Unit =>
  (Object.hasOwn(MEASURE_UNITS, name) ? MEASURE_UNITS[name as Measure] : undefined) ?? "load";

/** The unit of the value that the condition compares; null if it compares none. */
export function unitOf(condition: Condition): Unit | null {
  switch (condition.kind) {
    case "measure": return unitOfMeasure(condition.measure);
    case "filesystem":
    case "process_mem": return "percent";
    case "process_cpu": return "core";
    case "process_count": return "count";
    default: return null;
  }
}

const number = (value: number): string => (Number.isInteger(value) ? whole : tenths)(value);

/** A limit as a user wrote it: without a decimal that it does not have. */
function limitText(unit: Unit | null, value: number): string {
  if (unit === "percent" || unit === "core") return `${number(value)}%`;
  return unit === "rate" ? rate(value) : number(value);
}

/** The newest value of an alert; null if it has none. */
export function valueText(condition: Condition, value: number | null): string | null {
  const unit = unitOf(condition);
  if (value === null || unit === null) return null;
  if (unit === "percent" || unit === "core") return percent(value);
  if (unit === "rate") return rate(value);
  if (condition.kind === "process_count") return t().alerts.condition.running(whole(value));
  return unit === "count" ? whole(value) : tenths(value);
}

/** The condition as a phrase, such as "CPU usage above 95%". */
export function conditionText(condition: Condition): string {
  const texts = t().alerts.condition;
  const compared = (what: string, { direction, limit }: Threshold) =>
    texts.compared(what, textOf(texts.direction, direction), limitText(unitOf(condition), limit));
  switch (condition.kind) {
    case "measure": return compared(textOf(texts.measures, condition.measure), condition.threshold);
    case "filesystem": return compared(texts.filesystem(condition.mount_point ?? undefined), condition.threshold);
    case "process_count": {
      const { name, threshold } = condition;
      const isMissing = threshold.direction === "below" && threshold.limit === 1;
      return isMissing ? texts.noProcess(name) : compared(texts.processCount(name), threshold);
    }
    case "process_cpu": return compared(texts.processCpu(condition.name), condition.threshold);
    case "process_mem": return compared(texts.processMem(condition.name), condition.threshold);
    case "vm_state": return texts.vmState(condition.states.map((state) => textOf(t().state, state)).join(texts.or));
    case "agent_silent": return texts.agentSilent;
    case "agent_fault": return texts.agentFault(textOf(texts.faults, condition.fault));
    case "operation_failed": return texts.operationFailed;
    case "not_receiving": return texts.notReceiving;
    default: return t().common.unknown;
  }
}

/** The condition with the time for which it must hold. */
export function lastingText(condition: Condition, seconds: number): string {
  const text = conditionText(condition);
  return seconds === 0 ? text : t().alerts.condition.lasting(text, wholeDuration(seconds * SECOND));
}

/** A duration without units that are zero, such as "15 min". */
export function wholeDuration(length: number): string {
  const { hours, minutes, seconds, days } = t().units;
  for (const [size, unit] of [[86_400_000, days], [3_600_000, hours], [60_000, minutes], [1000, seconds]] as const) {
    if (length >= size && length % size === 0) return `${whole(length / size)}\u00a0${unit}`;
  }
  return duration(length);
}

/** The name of an action on a VM. */
export function actionText(action: string): string {
  const { confirm, confirmTitle, mayNot, menu, ...actions } = t().action;
  // The operations that alerts name are those of the services, which write names with underscores.
  return textOf(actions, action.replaceAll("_", "-"));
}
