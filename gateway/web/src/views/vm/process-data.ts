//! Reads the process table of a moment, which is complete up to a stated number of processes.
import { useEffect } from "preact/hooks";
import { api, ask, type Schemas } from "../../api/client";
import { onEvent } from "../../api/live";
import { useResource } from "../../api/resource";

export type Table = Schemas["ProcessTable"];

/** Maximum number of processes on one page of the API. */
const PAGE = 1000;
/** Maximum number of processes read for the flat table, over several pages if needed. */
const MAX_LISTED = 1000;
/** Maximum number of processes read for groups; the processes with the highest CPU usage are read first. */
const MAX_GROUPED = 10_000;

/** The process table at the moment, or now if it is null. All processes are read if they are to be grouped. */
export function useTable(id: string, at: number | null, isGrouped: boolean) {
  const most = isGrouped ? MAX_GROUPED : MAX_LISTED;
  const table = useResource((signal) => readTable(id, at, most, signal), [id, at, most]);
  useEffect(() => {
    if (at !== null) return;
    return onEvent("processes", (event) => event.instance_id === id && table.reload());
  }, [id, at, most]);
  return table;
}

/** Reads a table page by page. A page is also limited in bytes, so long names can make it short. */
async function readTable(id: string, at: number | null, most: number, signal: AbortSignal): Promise<Table> {
  const moment = at === null ? {} : { at: new Date(at).toISOString() };
  const read = (limit: number, cursor: string | null) => {
    const query = { limit: Math.min(limit, PAGE), ...moment, ...(cursor !== null && { cursor }) };
    const params = { path: { instance_id: id }, query };
    return ask(api.GET("/api/v1/vms/{instance_id}/processes", { params, signal }));
  };
  let table = await read(most, null);
  const processes = [...table.processes];
  while (table.next !== null && processes.length < most) {
    table = await read(most - processes.length, table.next);
    processes.push(...table.processes);
  }
  return { ...table, processes };
}
