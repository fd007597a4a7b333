import type { Schemas } from "../api/client";
import { t } from "../i18n";

type Tone = "good" | "bad" | "warn" | "busy" | "quiet";

export function Badge({ tone, children }: { tone: Tone; children: string }) {
  return <span class={`badge ${tone}`}>{children}</span>;
}

const MACHINE: Record<Schemas["MachineState"], Tone> = {
  running: "good",
  starting: "busy",
  paused: "warn",
  shutting_down: "busy",
  shut_off: "quiet",
  crashed: "bad",
  suspended: "warn",
  unknown: "quiet",
};

export function MachineBadge({ state }: { state: Schemas["MachineState"] | null }) {
  return <Badge tone={state ? MACHINE[state] : "quiet"}>{t().state[state ?? "none"]}</Badge>;
}

const OPERATION: Record<Schemas["OperationState"], Tone> = {
  requested: "busy",
  running: "busy",
  succeeded: "good",
  failed: "bad",
  timed_out: "bad",
  outcome_unknown: "warn",
};

export function OperationBadge({ state }: { state: Schemas["OperationState"] }) {
  return <Badge tone={OPERATION[state]}>{t().operation.states[state]}</Badge>;
}

export const isOver = (state: Schemas["OperationState"]): boolean => state !== "requested" && state !== "running";
