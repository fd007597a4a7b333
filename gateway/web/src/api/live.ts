//! Client for live events (docs/api/rest.md). It uses fetch instead of EventSource, which hides heartbeats and HTTP
//! statuses: a connection that died silently would still look live.
import { signal } from "@preact/signals";
import { me, type Schemas } from "./client";

interface Kinds {
  sample: Schemas["SampleEvent"];
  hypervisor_sample: Schemas["HypervisorSampleEvent"];
  processes: Schemas["ProcessesEvent"];
  operation: Schemas["Operation"];
  machine: Schemas["MachineEvent"];
  removed: Schemas["RemovedEvent"];
  alert: Schemas["Alert"];
}

export type LiveState = "connecting" | "live" | "lost";

export const liveState = signal<LiveState>("connecting");
/** Incremented when missed events cannot be replayed; views then reload their data. */
export const gaps = signal(0);

/** The gateway sends an event or a heartbeat at least every 15 seconds. */
const SILENCE_MS = 25_000;
const RETRY_MS = 1_000;
const MAX_RETRY_MS = 10_000;

const listeners: { [K in keyof Kinds]: Set<(event: Kinds[K]) => void> } = {
  sample: new Set(),
  hypervisor_sample: new Set(),
  processes: new Set(),
  operation: new Set(),
  machine: new Set(),
  removed: new Set(),
  alert: new Set(),
};

/** Subscribes to events of one kind. Returns the function that unsubscribes. */
export function onEvent<K extends keyof Kinds>(kind: K, listener: (event: Kinds[K]) => void): () => void {
  listeners[kind].add(listener);
  return () => listeners[kind].delete(listener);
}

/** Maximum number of VMs that one stream selects. */
const MAX_WATCHED = 200;
/** A changed selection takes effect after this delay, because a list that scrolls changes it with every row. */
const SETTLE_MS = 300;

/** VMs whose events the views need; if there are none, they need the operations and alerts of all VMs. */
let wanted: ReadonlySet<string> = new Set();
/** VMs whose events the open stream delivers; if there are none, it delivers the operations and alerts of all VMs. */
let watched: ReadonlySet<string> = new Set();
let settling: ReturnType<typeof setTimeout> | undefined;
/** Ends the open stream, so that the next one is opened for the wanted VMs. */
let reopen = (): void => undefined;

/** Selects the VMs whose events arrive. Without ids, the operations and alerts of all VMs arrive and no other events. */
export function watch(ids: readonly string[]): void {
  wanted = new Set(ids.slice(0, MAX_WATCHED));
  clearTimeout(settling);
  settling = setTimeout(() => {
    if (!suffices()) reopen();
  }, SETTLE_MS);
}

/** Whether the open stream delivers the events of all wanted VMs, and of few others. */
function suffices(): boolean {
  if (wanted.size === 0 || watched.size > 2 * wanted.size) return watched.size === wanted.size;
  return [...wanted].every((id) => watched.has(id));
}

/** Whether the open stream delivers the operations on this VM. */
export const isWatched = (id: string): boolean => watched.size === 0 || watched.has(id);

let lastId: string | null = null;

/** Connects, and reconnects after each failure. Returns the function that stops it. */
export function followLive(): () => void {
  const stop = new AbortController();
  lastId = null;
  liveState.value = "connecting";
  void reconnectUntil(stop.signal);
  return () => stop.abort();
}

async function reconnectUntil(stop: AbortSignal): Promise<void> {
  let failures = 0;
  while (!stop.aborted) {
    const replaced = new AbortController();
    reopen = () => replaced.abort();
    try {
      await followOnce(AbortSignal.any([stop, replaced.signal]), () => (failures = 0));
    } catch {
      // All failures are handled alike: the page shows the connection as lost and reconnects.
    }
    if (stop.aborted || me.peek() === null) return;
    // The next stream replays what was sent meanwhile, so the page stays live.
    if (replaced.signal.aborted) continue;
    liveState.value = "lost";
    const wait = Math.min(RETRY_MS * 2 ** failures++, MAX_RETRY_MS);
    // Random delay, so that not all pages reconnect at once after a gateway restart.
    const jittered = wait * (0.5 + Math.random());
    await new Promise((resolve) => setTimeout(resolve, jittered));
  }
}

async function followOnce(stop: AbortSignal, connected: () => void): Promise<void> {
  const silence = new AbortController();
  const hangUp = () => silence.abort();
  watched = wanted;
  const selection = watched.size > 0 ? `instance_id=${[...watched].join(",")}` : "kind=operation,alert";
  let timer = setTimeout(hangUp, SILENCE_MS);
  try {
    const headers: Record<string, string> = lastId === null ? {} : { "Last-Event-ID": lastId };
    const signal = AbortSignal.any([stop, silence.signal]);
    const response = await fetch(`/api/v1/events?${selection}`, { headers, signal });
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
      for (const frame of frames) handleFrame(frame, connected);
    }
  } finally {
    clearTimeout(timer);
  }
}

function handleFrame(frame: string, connected: () => void): void {
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
    dispatch(kind as keyof Kinds, JSON.parse(fields.get("data") ?? "null"));
  }
}

function dispatch<K extends keyof Kinds>(kind: K, event: Kinds[K]): void {
  for (const listener of listeners[kind]) listener(event);
}
