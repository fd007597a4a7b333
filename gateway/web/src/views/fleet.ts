//! Hook for the list of all VMs: loads it once and keeps it up to date with live events.
import { useEffect, useRef, useState } from "preact/hooks";
import { api, ask, type Failure, type Schemas, type Vm } from "../api/client";
import { onEvent } from "../api/live";
import { useEvery, useResource } from "../api/resource";
import { latest } from "../operations";

/** A page of the API; more VMs than that are searched rather than scrolled through. */
const MOST = 1000;
/** What events do not tell is read this often: which VMs fell silent, and the sparklines. */
const REFRESH_MS = 30_000;
/** Many VMs report every second; what is shown follows this often. */
const DRAW_MS = 250;

export interface Entry {
  vm: Vm;
  /** What the search looks in. */
  text: string;
}

interface Fleet {
  entries: Entry[];
  total: number;
  degraded: Schemas["Degraded"][];
  loaded: boolean;
  failure: Failure | undefined;
  reload: () => void;
}

const entryOf = (vm: Vm): Entry => ({
  vm,
  text: `${vm.name ?? ""}\n${vm.instance_id}\n${vm.hypervisor ?? ""}`.toLowerCase(),
});

export function useFleet(): Fleet {
  const list = useResource(
    (signal) => ask(api.GET("/api/v1/vms", { params: { query: { sort: "cpu", limit: MOST } }, signal })),
    [],
  );
  useEvery(REFRESH_MS, list.reload);
  const known = useRef(new Map<string, Entry>());
  const [, draw] = useState(0);
  const source = useRef<unknown>(undefined);
  if (list.data && source.current !== list.data) {
    source.current = list.data;
    known.current = new Map(list.data.vms.map((vm) => [vm.instance_id, entryOf(vm)]));
  }
  useEffect(() => {
    let timer: ReturnType<typeof setTimeout> | undefined;
    const change = (id: string, changes: Partial<Vm>) => {
      const entry = known.current.get(id);
      if (!entry) return;
      known.current.set(id, { ...entry, vm: { ...entry.vm, ...changes } });
      timer ??= setTimeout(() => {
        timer = undefined;
        draw((count) => count + 1);
      }, DRAW_MS);
    };
    const stops = [
      onEvent("sample", ({ instance_id, ...sample }) => {
        const last_report_at = new Date().toISOString();
        // Reload the list when a VM that is not in it reports for the first time.
        if (!known.current.has(instance_id) && source.current) list.reload();
        change(instance_id, { sample, agent: "reporting", last_report_at });
      }),
      onEvent("machine", ({ instance_id, state }) => change(instance_id, { state })),
      onEvent("operation", ({ instance_id, machine_state }) => {
        if (machine_state) change(instance_id, { state: machine_state });
      }),
    ];
    return () => {
      clearTimeout(timer);
      stops.forEach((stop) => stop());
    };
  }, []);
  // Read the signal, so that the list is rendered again when the newest operation on a VM changes.
  void latest.value;
  return {
    entries: [...known.current.values()],
    total: list.data?.total ?? 0,
    degraded: list.data?.degraded ?? [],
    loaded: list.data !== undefined,
    failure: list.failure,
    reload: list.reload,
  };
}
