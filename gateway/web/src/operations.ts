//! Commands on VMs: given, and followed to their end.
import { signal } from "@preact/signals";
import { api, ask, type Operation, type Schemas } from "./api/client";
import { liveState, on } from "./api/live";
import { isOver } from "./parts/badge";

export type Action = Schemas["Action"];

/** Where live events are lost, a command's record is read this often. */
const POLL_MS = 2_000;
/** VMs whose newest command is remembered. */
const REMEMBERED = 200;

/** The newest command that was seen on each VM. */
export const latest = signal<ReadonlyMap<string, Operation>>(new Map());

/** Takes an operation as it is now, unless a newer one is known. */
function remember(operation: Operation): void {
  const known = latest.peek().get(operation.instance_id);
  if (known && known.requested_at > operation.requested_at) return;
  if (known && known.id === operation.id && known.history.length > operation.history.length) return;
  const all = new Map(latest.peek());
  all.delete(operation.instance_id);
  all.set(operation.instance_id, operation);
  for (const id of all.keys()) {
    if (all.size <= REMEMBERED) break;
    all.delete(id);
  }
  latest.value = all;
}

export function forget(instance: string): void {
  const all = new Map(latest.peek());
  all.delete(instance);
  latest.value = all;
}

export function followOperations(): () => void {
  return on("operation", remember);
}

/** Asks for it; it is followed on its own, whatever view is shown. */
export async function act(instance: string, action: Action): Promise<void> {
  const operation = await ask(
    api.POST("/api/v1/vms/{instance_id}/actions", {
      params: { path: { instance_id: instance }, header: { "Idempotency-Key": crypto.randomUUID?.() ?? key() } },
      body: { action },
    }),
  );
  remember(operation);
  void pollWhileLost(operation.id);
}

/** randomUUID is there on secure origins only, and a gateway may be reached over plain HTTP. */
function key(): string {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function pollWhileLost(id: string): Promise<void> {
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    const known = [...latest.peek().values()].find((operation) => operation.id === id);
    if (!known || isOver(known.state)) return;
    if (liveState.peek() === "live") continue;
    try {
      remember(await ask(api.GET("/api/v1/operations/{operation_id}", { params: { path: { operation_id: id } } })));
    } catch {
      // Away, like live events: the next try may find it.
    }
  }
}
