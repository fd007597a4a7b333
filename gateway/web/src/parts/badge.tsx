import type { Schemas } from "../api/client";
import { t, textOf } from "../i18n";

export type Tone = "good" | "bad" | "warn" | "busy" | "quiet";

/** The tone of a value; quiet for a value of a newer version of the gateway. */
export const toneOf = (tones: Record<string, Tone>, value: string): Tone =>
  (Object.hasOwn(tones, value) ? tones[value] : undefined) ?? "quiet";

export function Badge({ tone, title, children }: { tone: Tone; title?: string; children: string }) {
  return <span class={`badge ${tone}`} title={title}>{children}</span>;
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
  return <Badge tone={toneOf(MACHINE, state ?? "none")}>{textOf(t().state, state ?? "none")}</Badge>;
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
  return <Badge tone={toneOf(OPERATION, state)}>{textOf(t().operation.states, state)}</Badge>;
}

export const isOver = (state: Schemas["OperationState"]): boolean => state !== "requested" && state !== "running";
