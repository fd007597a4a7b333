//! Live events (docs/api/rest.md), by fetch rather than EventSource: that one shows neither heartbeats nor statuses, so
//! that a connection that died silently would look live.
import { signal } from "@preact/signals";
import { me, type Schemas } from "./client";

interface Kinds {
  sample: Schemas["SampleEvent"];
  processes: Schemas["ProcessesEvent"];
  operation: Schemas["Operation"];
  machine: Schemas["MachineEvent"];
}

export type LiveState = "connecting" | "live" | "lost";

export const liveState = signal<LiveState>("connecting");
/** Grows when more was missed than is told again: what is shown must be read anew. */
export const gaps = signal(0);

/** The gateway says something at least every 15 seconds. */
const SILENCE_MS = 25_000;
const AGAIN_MS = 1_000;
const AGAIN_AT_MOST_MS = 10_000;

const listeners: { [K in keyof Kinds]: Set<(event: Kinds[K]) => void> } = {
  sample: new Set(),
  processes: new Set(),
  operation: new Set(),
  machine: new Set(),
};

/** Calls back on every event of this kind, until the function that it gives back is called. */
export function on<K extends keyof Kinds>(kind: K, listener: (event: Kinds[K]) => void): () => void {
  listeners[kind].add(listener);
  return () => listeners[kind].delete(listener);
}

let lastId: string | null = null;

/** Follows until the function that it gives back is called; connects again by itself. */
export function followLive(): () => void {
  const stop = new AbortController();
  lastId = null;
  liveState.value = "connecting";
  void followForEver(stop.signal);
  return () => stop.abort();
}

async function followForEver(stop: AbortSignal): Promise<void> {
  let failures = 0;
  while (!stop.aborted) {
    try {
      await followOnce(stop, () => (failures = 0));
    } catch {
      // Whatever broke, the answer is the same: say so, and connect again.
    }
    if (stop.aborted || me.peek() === null) return;
    liveState.value = "lost";
    const wait = Math.min(AGAIN_MS * 2 ** failures++, AGAIN_AT_MOST_MS);
    // At random, so that the pages of a gateway that restarted do not all come at once.
    const jittered = wait * (0.5 + Math.random());
    await new Promise((resolve) => setTimeout(resolve, jittered));
  }
}

async function followOnce(stop: AbortSignal, connected: () => void): Promise<void> {
  const silence = new AbortController();
  const hangUp = () => silence.abort();
  stop.addEventListener("abort", hangUp);
  let timer = setTimeout(hangUp, SILENCE_MS);
  try {
    const headers: Record<string, string> = lastId === null ? {} : { "Last-Event-ID": lastId };
    const response = await fetch("/api/v1/events", { headers, signal: silence.signal });
    if (response.status === 401) me.value = null;
    if (!response.ok || !response.body) return;
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      clearTimeout(timer);
      timer = setTimeout(hangUp, SILENCE_MS);
      const frames = (rest + value).split("\n\n");
      rest = frames.pop() ?? "";
      for (const frame of frames) take(frame, connected);
    }
  } finally {
    clearTimeout(timer);
    stop.removeEventListener("abort", hangUp);
  }
}

function take(frame: string, connected: () => void): void {
  const fields = new Map<string, string>();
  for (const line of frame.split("\n")) {
    const colon = line.indexOf(":");
    if (colon > 0) fields.set(line.slice(0, colon), line.slice(colon + 1).trimStart());
  }
  lastId = fields.get("id") ?? lastId;
  const kind = fields.get("event");
  if (kind === "ready" || kind === "gap") {
    connected();
    if (kind === "gap") gaps.value++;
    liveState.value = "live";
  } else if (kind === "end") {
    me.value = null;
  } else if (kind !== undefined && kind in listeners) {
    hand(kind as keyof Kinds, JSON.parse(fields.get("data") ?? "null"));
  }
}

function hand<K extends keyof Kinds>(kind: K, event: Kinds[K]): void {
  for (const listener of listeners[kind]) listener(event);
}
