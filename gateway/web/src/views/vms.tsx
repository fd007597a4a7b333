//! View that lists the VMs, the busiest first.
import { useEffect, useRef, useState } from "preact/hooks";
import { may } from "../api/client";
import { useEvery } from "../api/resource";
import { t } from "../i18n";
import { compare, SortHead, type Sorting } from "../parts/sorting";
import { DegradedNote, Failed, Loading, Notice } from "../parts/states";
import { useWindow } from "../parts/window";
import { adjust, route } from "../router";
import { type Entry, useFleet } from "./fleet";
import { VmRow } from "./vm-row";

const COLUMNS = ["name", "state", "cpu", "mem", "net", "disk", "report"] as const;
export type Column = (typeof COLUMNS)[number];
const DESCENDS: Record<Column, boolean> = {
  name: false, state: false, cpu: true, mem: true, net: true, disk: true, report: true,
};
/** Interval at which the VMs are sorted again; not while the pointer or the focus is on the list. */
const REORDER_MS = 5_000;

export function Vms() {
  const texts = t().vms;
  const query = route.value.query;
  const search = query.get("q") ?? "";
  const agent = query.get("agent") ?? "";
  const sorting = sortingOf(query);
  const fleet = useFleet();
  const shown = useOrder(fleet.entries, sorting, search, agent);
  const filtered = search !== "" || agent !== "";
  return (
    <>
      <div class="heading">
        <h1 tabIndex={-1}>{texts.title}</h1>
        {fleet.loaded && <span class="count" role="status">{texts.count(shown.length, fleet.total)}</span>}
        <Filters search={search} agent={agent} sorting={sorting} />
      </div>
      <DegradedNote degraded={fleet.degraded} />
      {fleet.total > fleet.entries.length && <div class="banner warn">{texts.truncated}</div>}
      {!fleet.loaded ? (
        fleet.failure ? <Failed failure={fleet.failure} retry={fleet.reload} /> : <Loading rows={10} />
      ) : shown.length > 0 ? (
        <Table entries={shown} sorting={sorting} />
      ) : filtered ? (
        <Notice title={texts.noMatchTitle}>
          <p>{texts.noMatch}</p>
          <button type="button" onClick={() => adjust({ q: null, agent: null })}>{texts.showAll}</button>
        </Notice>
      ) : (
        <Notice title={texts.emptyTitle}><p>{texts.empty}</p></Notice>
      )}
    </>
  );
}

function sortingOf(query: URLSearchParams): Sorting<Column> {
  const column = COLUMNS.find((known) => known === query.get("sort")) ?? "cpu";
  const order = query.get("order");
  return { column, descending: order === null ? DESCENDS[column] : order === "desc" };
}

function sortBy({ column, descending }: Sorting<Column>): void {
  adjust({ sort: column, order: descending ? "desc" : "asc" }, true);
}

function Filters({ search, agent, sorting }: { search: string; agent: string; sorting: Sorting<Column> }) {
  const texts = t().vms;
  const agents = ["reporting", "silent", "never"] as const;
  return (
    <div class="filters" role="search">
      <input
        type="search" aria-label={texts.search} placeholder={texts.search} value={search}
        onInput={(event) => adjust({ q: event.currentTarget.value || null }, true)}
      />
      <select
        aria-label={texts.agent} value={agent}
        onChange={(event) => adjust({ agent: event.currentTarget.value || null }, true)}
      >
        <option value="">{texts.agent}: {texts.all}</option>
        {agents.map((kind) => <option key={kind} value={kind}>{t().agent[kind]}</option>)}
      </select>
      <select
        class="narrow-only" aria-label={texts.sortBy} value={sorting.column}
        onChange={(event) => {
          const column = event.currentTarget.value as Column;
          sortBy({ column, descending: DESCENDS[column] });
        }}
      >
        {COLUMNS.map((column) => <option key={column} value={column}>{texts.sortBy}: {texts.columns[column]}</option>)}
      </select>
    </div>
  );
}

function Table({ entries, sorting }: { entries: Entry[]; sorting: Sorting<Column> }) {
  const texts = t().vms.columns;
  const body = useRef<HTMLTableSectionElement>(null);
  const { first, last, before, behind } = useWindow(body, entries.length);
  const acts = may("operator");
  const head = (column: Column, kind?: string) => (
    <SortHead column={column} sorting={sorting} descends={DESCENDS[column]} sort={sortBy} class={kind ?? column}>
      {texts[column]}
    </SortHead>
  );
  return (
    <table class="vms" aria-rowcount={entries.length + 1} id="vm-table">
      <thead>
        <tr>
          {head("name")}
          {head("state")}
          {head("cpu", "number")}
          <th scope="col" class="hour">{texts.hour}</th>
          {head("mem", "number")}
          {head("net", "number")}
          {head("disk", "number")}
          {head("report")}
          {acts && <th scope="col" class="act"><span class="hidden">{texts.action}</span></th>}
        </tr>
      </thead>
      <tbody ref={body}>
        {before > 0 && <tr class="spacer" style={{ height: `${before}px` }} aria-hidden="true"><td /></tr>}
        {entries.slice(first, last).map((entry, index) => (
          <VmRow key={entry.vm.instance_id} entry={entry} index={first + index + 2} acts={acts} />
        ))}
        {behind > 0 && <tr class="spacer" style={{ height: `${behind}px` }} aria-hidden="true"><td /></tr>}
      </tbody>
    </table>
  );
}

/** The VMs that match the filters, in an order that does not change while the user points at the list. */
function useOrder(entries: Entry[], sorting: Sorting<Column>, search: string, agent: string): Entry[] {
  const [turn, setTurn] = useState(0);
  const places = useRef(new Map<string, number>());
  const settled = `${sorting.column} ${String(sorting.descending)} ${turn} ${entries.length}`;
  const before = useRef("");
  if (before.current !== settled) {
    before.current = settled;
    const sorted = [...entries].sort(
      (one, other) =>
        compare(valueOf(one, sorting.column), valueOf(other, sorting.column), sorting.descending) ||
        one.vm.instance_id.localeCompare(other.vm.instance_id),
    );
    places.current = new Map(sorted.map((entry, index) => [entry.vm.instance_id, index]));
  }
  useEvery(REORDER_MS, () => {
    const table = document.getElementById("vm-table");
    if (!table?.matches(":hover") && !table?.contains(document.activeElement)) setTurn((count) => count + 1);
  });
  useEffect(() => scrollTo(0, 0), [sorting.column, sorting.descending, search, agent]);
  const text = search.toLowerCase();
  const at = (entry: Entry) => places.current.get(entry.vm.instance_id) ?? Number.MAX_SAFE_INTEGER;
  return entries
    .filter((entry) => entry.text.includes(text) && (agent === "" || entry.vm.agent === agent))
    .sort((one, other) => at(one) - at(other));
}

/** The value by which a column sorts. Measures of a VM whose agent has stopped reporting count as missing. */
function valueOf({ vm }: Entry, column: Column): number | string | null {
  const sample = vm.agent === "reporting" ? vm.sample : null;
  switch (column) {
    case "name": return vm.name ?? vm.instance_id;
    case "state": return vm.state;
    case "cpu": return sample && sample.cpu_util;
    case "mem": return sample && sample.mem;
    case "net": return sample && sample.net_incoming + sample.net_outgoing;
    case "disk": return sample && sample.disk_read + sample.disk_write;
    case "report": return vm.last_report_at;
  }
}
