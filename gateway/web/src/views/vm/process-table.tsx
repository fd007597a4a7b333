//! Shows the process table at the pinned moment, otherwise at the moment under the mouse pointer, otherwise now.
import type { Signal } from "@preact/signals";
import { useEffect, useMemo, useState } from "preact/hooks";
import { api, ask, type Schemas } from "../../api/client";
import { onEvent } from "../../api/live";
import { useResource } from "../../api/resource";
import { duration, ms, rate, shortTime, visible } from "../../format";
import { t } from "../../i18n";
import { Badge } from "../../parts/badge";
import { Meter } from "../../parts/meter";
import { compare, SortHead, type Sorting } from "../../parts/sorting";
import { Failed, Loading, Notice } from "../../parts/states";
import { adjust, route } from "../../router";
import { unpin } from "./range";

type Process = Schemas["Process"];
type Table = Schemas["ProcessTable"];

const COLUMNS = ["name", "pid", "cpu", "mem", "read", "write", "age"] as const;
type Column = (typeof COLUMNS)[number];
const DESCENDS: Record<Column, boolean> = {
  name: false, pid: false, cpu: true, mem: true, read: true, write: true, age: true,
};
/** How long the cursor must rest before the table is read. */
const DEBOUNCE_MS = 80;
/** Rows shown before "Show all" is clicked. */
const INITIAL_ROWS = 30;
/** Maximum number of processes read, over several pages if needed. */
const MAX_PROCESSES = 1000;

interface ProcessTableProps {
  id: string;
  hover: Signal<number | null>;
  /** Maps the start of a bucket to the moment whose processes are shown for it. */
  moment: (at: number) => number;
  pinned: number | null;
  live: boolean;
  /** The end of the selected range; the default moment when not live. */
  to: number;
}

export function ProcessTable({ id, hover, moment, pinned, live, to }: ProcessTableProps) {
  const texts = t().table;
  const pointed = useDebounced(hover.value);
  const at = pinned ?? (pointed !== null ? moment(pointed) : live ? null : Math.min(to, Date.now()));
  const table = useTable(id, at);
  const [sorting, setSorting] = useState<Sorting<Column>>({ column: "cpu", descending: true });
  const [filter, setFilter] = useState("");
  const [all, setAll] = useState(false);
  const matching = useMemo(
    () => (table.data?.processes ?? [])
      .filter((process) => process.name.toLowerCase().includes(filter.toLowerCase()))
      .sort((one, other) =>
        compare(valueOf(one, sorting.column), valueOf(other, sorting.column), sorting.descending) || one.pid - other.pid),
    [table.data, filter, sorting],
  );
  const sampled = table.data?.at ? ms(table.data.at) : null;
  const shown = all ? matching : matching.slice(0, INITIAL_ROWS);
  const head = (column: Column, kind: string) => (
    <SortHead column={column} sorting={sorting} descends={DESCENDS[column]} sort={setSorting} class={kind}>
      {texts.columns[column]}
    </SortHead>
  );
  return (
    <section class="processes" aria-label={texts.title}>
      <div class="heading">
        <h2>{texts.title}</h2>
        <span class="moment" data-at={sampled ?? ""}>
          {sampled !== null && texts.at(shortTime(sampled))}{" "}
          {pinned !== null ? <Badge tone="busy">{texts.pinned}</Badge> : at === null && <Badge tone="good">{texts.now}</Badge>}
        </span>
        {pinned !== null && (
          <button type="button" onClick={unpin}>{texts.unpin} <kbd>{texts.unpinHint}</kbd></button>
        )}
        {table.data && <span class="count">{texts.count(matching.length, table.data.total)}</span>}
        <input
          type="search" aria-label={texts.filter} placeholder={texts.filter} value={filter}
          onInput={(event) => setFilter(event.currentTarget.value)}
        />
      </div>
      {!table.data ? (
        table.failure ? <Failed failure={table.failure} retry={table.reload} /> : <Loading />
      ) : table.data.processes.length === 0 ? (
        <Notice title={texts.emptyTitle}><p>{texts.empty}</p></Notice>
      ) : shown.length === 0 ? (
        <p class="faint">{texts.noMatch}</p>
      ) : (
        <table class="process" aria-busy={table.loading}>
          <thead>
            <tr>
              {head("name", "name")}
              {head("pid", "number pid")}
              {head("cpu", "number cpu")}
              {head("mem", "number mem")}
              {head("read", "number read")}
              {head("write", "number write")}
              {head("age", "number age")}
            </tr>
          </thead>
          <tbody>
            {shown.map((process) => (
              <Row key={`${process.pid} ${process.started_at}`} process={process} sampled={sampled ?? 0} />
            ))}
          </tbody>
        </table>
      )}
      {shown.length < matching.length && (
        <button type="button" class="more" onClick={() => setAll(true)}>{texts.showAll(matching.length)}</button>
      )}
    </section>
  );
}

function Row({ process, sampled }: { process: Process; sampled: number }) {
  const { name, pid } = process;
  const { query } = route.value;
  const chosen = query.get("process") === name && query.get("pid") === String(pid);
  const ended = process.ended_at !== null;
  return (
    <tr class={`${chosen ? "chosen" : ""} ${ended ? "ended" : ""}`} data-pid={pid}>
      <th scope="row" class="name">
        <button
          type="button" class="link" aria-label={t().table.historyOf(name, pid)} aria-pressed={chosen}
          onClick={() => adjust(chosen ? { process: null, pid: null } : { process: name, pid: String(pid) })}
        >
          {visible(name)}
        </button>
        {ended && <Badge tone="quiet">{t().table.ended}</Badge>}
      </th>
      <td class="number pid">{pid}</td>
      <td class="number cpu"><Meter value={process.cpu_util} /></td>
      <td class="number mem"><Meter value={process.mem} hot={50} /></td>
      <td class="number read">{rate(process.disk_read)}</td>
      <td class="number write">{rate(process.disk_write)}</td>
      <td class="number age">{duration(ageOf(process, sampled))}</td>
    </tr>
  );
}

const ageOf = (process: Process, sampled: number): number =>
  Math.max(0, (process.ended_at === null ? sampled : ms(process.ended_at)) - ms(process.started_at));

function valueOf(process: Process, column: Column): number | string {
  switch (column) {
    case "name": return process.name;
    case "pid": return process.pid;
    case "cpu": return process.cpu_util;
    case "mem": return process.mem;
    case "read": return process.disk_read;
    case "write": return process.disk_write;
    case "age": return -ms(process.started_at);
  }
}

/** Debounces changes of the value; null takes effect immediately. */
function useDebounced(value: number | null): number | null {
  const [settled, setSettled] = useState(value);
  useEffect(() => {
    const timer = setTimeout(() => setSettled(value), DEBOUNCE_MS);
    return () => clearTimeout(timer);
  }, [value]);
  return value === null ? null : settled;
}

function useTable(id: string, at: number | null) {
  const table = useResource((signal) => readTable(id, at, signal), [id, at]);
  useEffect(() => {
    if (at !== null) return;
    return onEvent("processes", (event) => event.instance_id === id && table.reload());
  }, [id, at]);
  return table;
}

/** Reads a table page by page. A page is also limited in bytes, so long names can make it short. */
async function readTable(id: string, at: number | null, signal: AbortSignal): Promise<Table> {
  const moment = at === null ? {} : { at: new Date(at).toISOString() };
  const read = (limit: number, cursor: string | null) => {
    const query = { limit, ...moment, ...(cursor !== null && { cursor }) };
    const params = { path: { instance_id: id }, query };
    return ask(api.GET("/api/v1/vms/{instance_id}/processes", { params, signal }));
  };
  let table = await read(MAX_PROCESSES, null);
  while (table.next !== null && table.processes.length < MAX_PROCESSES) {
    const page = await read(MAX_PROCESSES - table.processes.length, table.next);
    table = { ...page, processes: [...table.processes, ...page.processes] };
  }
  return table;
}
