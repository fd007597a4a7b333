//! What the form of a rule holds, and how it becomes a rule.
import type { Severity } from "../../alerts";
import type { Schemas } from "../../api/client";
import { conditionText, MEASURES, type Condition, type Measure, type Threshold } from "./texts";

export type RuleSpec = Schemas["RuleSpec"];
export type Kind = Condition["kind"];
export type Direction = Schemas["Direction"];
export type FaultKind = Schemas["AgentFaultKind"];
export type TimeUnit = "s" | "min" | "h";
export type MachineState = Schemas["MachineState"];

export const KINDS: Kind[] = [
  "measure", "filesystem", "process_count", "process_cpu", "process_mem", "vm_state", "agent_silent", "agent_fault", "operation_failed",
  "not_receiving",
];
export const FAULTS: FaultKind[] = ["clock", "utc_offset", "two_agents", "not_stored", "over_limit"];
export const STATES: MachineState[] = ["running", "starting", "paused", "suspended", "shutting_down", "shut_off", "crashed"];
export const SECONDS: Record<TimeUnit, number> = { s: 1, min: 60, h: 3600 };

/** The values of all fields of the form, as the user entered them. */
export interface Draft {
  name: string;
  enabled: boolean;
  severity: Severity;
  kind: Kind;
  measure: Measure;
  mount: string;
  process: string;
  direction: Direction;
  limit: string;
  clear: string;
  states: MachineState[];
  fault: FaultKind;
  duration: string;
  unit: TimeUnit;
  /** Whether the rule applies only to some VMs. */
  selects: boolean;
  labels: string;
  ids: string;
  hypervisor: string;
  pattern: string;
  recipients: string[];
}

const NEW: Draft = {
  name: "", enabled: true, severity: "warning", kind: "measure", measure: "cpu_util", mount: "", process: "", direction: "above",
  limit: "90", clear: "", states: ["shut_off", "crashed"], fault: "clock", duration: "5", unit: "min", selects: false, labels: "",
  ids: "", hypervisor: "", pattern: "", recipients: [],
};

/** The form of a rule, or of a new one. */
export function draftOf(spec?: RuleSpec): Draft {
  if (!spec) return NEW;
  const { name, enabled, severity, condition, for_seconds, vms = {}, recipients = [] } = spec;
  const { ids = [], labels = [], hypervisor, name: pattern } = vms;
  return {
    ...NEW, name, enabled, severity, recipients, ...fieldsOf(condition), ...timeOf(for_seconds),
    selects: ids.length + labels.length > 0 || Boolean(hypervisor) || Boolean(pattern),
    labels: labels.join("\n"), ids: ids.join("\n"), hypervisor: hypervisor ?? "", pattern: pattern ?? "",
  };
}

function fieldsOf(condition: Condition): Partial<Draft> {
  const { kind } = condition;
  const compared = ({ direction, limit, clear }: Threshold) =>
    ({ direction, limit: String(limit), clear: clear === undefined || clear === null ? "" : String(clear) });
  switch (kind) {
    case "measure": {
      const measure = MEASURES.find((known) => known === condition.measure) ?? NEW.measure;
      return { kind, measure, ...compared(condition.threshold) };
    }
    case "filesystem": return { kind, mount: condition.mount_point ?? "", ...compared(condition.threshold) };
    case "process_count":
    case "process_cpu":
    case "process_mem": return { kind, process: condition.name, ...compared(condition.threshold) };
    case "vm_state": return { kind, states: condition.states };
    case "agent_fault": return { kind, fault: condition.fault };
    default: return { kind };
  }
}

/** The duration in its largest unit that makes it an integer. */
function timeOf(seconds: number): Pick<Draft, "duration" | "unit"> {
  const unit = (["h", "min"] as const).find((unit) => seconds > 0 && seconds % SECONDS[unit] === 0) ?? (seconds === 0 ? "min" : "s");
  return { duration: String(seconds / SECONDS[unit]), unit };
}

/** The changes of a form in which the user chose another kind: limits of another kind mean something else. */
export function withKind(draft: Draft, kind: Kind): Draft {
  if (kind === draft.kind) return draft;
  if (kind === "process_count") return { ...draft, kind, direction: "below", limit: "1", clear: "" };
  return { ...draft, kind, ...(draft.kind === "process_count" && { direction: "above", limit: "90", clear: "" }) };
}

/** The name that a rule gets if the user enters none. Three bytes per character fit into what the API accepts. */
export const defaultName = (draft: Draft): string => [...conditionText(conditionOf(draft))].slice(0, 42).join("");

/** The rule that the form describes. */
export function specOf(draft: Draft): RuleSpec {
  const { name, enabled, severity, duration, unit, recipients } = draft;
  return {
    name: name.trim() || defaultName(draft), enabled, severity, condition: conditionOf(draft), for_seconds: Math.round(Number(duration) * SECONDS[unit]),
    vms: selectorOf(draft), recipients,
  };
}

export function conditionOf(draft: Draft): Condition {
  const { kind, measure, mount, process: name, states, fault } = draft;
  switch (kind) {
    case "measure": return { kind, measure, threshold: thresholdOf(draft) };
    case "filesystem": return { kind, threshold: thresholdOf(draft), ...(mount.trim() && { mount_point: mount.trim() }) };
    case "process_count":
    case "process_cpu":
    case "process_mem": return { kind, name, threshold: thresholdOf(draft) };
    case "vm_state": return { kind, states };
    case "agent_fault": return { kind, fault };
    default: return { kind };
  }
}

function thresholdOf({ direction, limit, clear }: Draft): Threshold {
  return { direction, limit: Number(limit), ...(clear.trim() !== "" && { clear: Number(clear) }) };
}

function selectorOf({ selects, kind, labels, ids, hypervisor, pattern }: Draft): NonNullable<RuleSpec["vms"]> {
  // An alert that vmwatch receives no samples is about no VM.
  if (!selects || kind === "not_receiving") return {};
  const lines = (text: string) => text.split("\n").map((line) => line.trim()).filter(Boolean);
  const [labelled, named] = [lines(labels), ids.split(/[\s,;]+/).filter(Boolean)];
  return {
    ...(labelled.length > 0 && { labels: labelled }),
    ...(named.length > 0 && { ids: named }),
    ...(hypervisor.trim() && { hypervisor: hypervisor.trim() }),
    ...(pattern.trim() && { name: pattern.trim() }),
  };
}
