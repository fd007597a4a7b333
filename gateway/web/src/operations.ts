//! Submits operations on VMs and follows them until they finish.
import { signal } from "@preact/signals";
import { api, ask, type Operation, type Schemas } from "./api/client";
import { isWatched, liveState, onEvent } from "./api/live";
import { isOver } from "./parts/badge";

export type Action = Schemas["Action"];

/** Interval at which a running operation is polled while the page receives no live events about it. */
const POLL_MS = 2_000;
/** Maximum number of VMs whose latest operation is kept. */
const MAX_REMEMBERED = 200;

/** The latest known operation of each VM. */
export const latest = signal<ReadonlyMap<string, Operation>>(new Map());

/** Stores an operation, unless a newer version or a newer operation of the VM is known. */
function remember(operation: Operation): void {
  const known = latest.peek().get(operation.instance_id);
  if (known && known.requested_at > operation.requested_at) return;
  if (known && known.id === operation.id && known.history.length > operation.history.length) return;
  const all = new Map(latest.peek());
  all.delete(operation.instance_id);
  all.set(operation.instance_id, operation);
  for (const id of all.keys()) {
    if (all.size <= MAX_REMEMBERED) break;
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
  return onEvent("operation", remember);
}

/**
 * Submits an operation and follows it to its end, even if the user leaves the view. Without a hypervisor, the only one that
 * has the VM carries it out.
 */
export async function act(instance: string, action: Action, hypervisor?: string): Promise<void> {
  const operation = await ask(
    api.POST("/api/v1/vms/{instance_id}/actions", {
      params: { path: { instance_id: instance }, header: { "Idempotency-Key": crypto.randomUUID?.() ?? randomKey() } },
      body: { action, ...(hypervisor !== undefined && { hypervisor }) },
    }),
  );
  remember(operation);
  void pollWhileUnwatched(operation.id);
}

/** Creates a random UUID. `crypto.randomUUID` exists only on HTTPS pages, and the gateway may be used over plain HTTP. */
function randomKey(): string {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function pollWhileUnwatched(id: string): Promise<void> {
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    const known = [...latest.peek().values()].find((operation) => operation.id === id);
    if (!known || isOver(known.state)) return;
    if (liveState.peek() === "live" && isWatched(known.instance_id)) continue;
    try {
      remember(await ask(api.GET("/api/v1/operations/{operation_id}", { params: { path: { operation_id: id } } })));
    } catch {
      // The request may fail while the gateway is unreachable; the next poll tries again.
    }
  }
}
