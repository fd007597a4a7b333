//! View that lists the VMs, the busiest first.
import { useEffect, useRef } from "preact/hooks";
import type { Schemas } from "../api/client";
import { now } from "../clock";
import { ago, ms } from "../format";
import { t } from "../i18n";
import type { Sorting } from "../parts/sorting";
import { DegradedNote, Failed, Loading, Notice } from "../parts/states";
import { adjust, route } from "../router";
import { AddVm } from "./add-vm";
import { type Selection, useFleet } from "./fleet";
import { type Column, COLUMNS, DESCENDS, heldVms, VmTable } from "./vm-table";

const AGENTS: Schemas["AgentFilter"][] = ["reporting", "silent", "never", "faulty"];
const STATES = ["running", "starting", "paused", "suspended", "shutting_down", "shut_off", "crashed"] as const;
/** Maximum length of a search that the API accepts. */
const MAX_SEARCH = 128;
/** Maximum length of a filter by label that the API accepts. */
const MAX_LABEL = 322;
/** Maximum number of hypervisors that are named as out of date. */
const MAX_NAMED = 3;

export function Vms() {
  const texts = t().vms;
  const selection = selectionOf(route.value.query);
  const { q, state, agent, label, sort, order } = selection;
  const sorting = { column: sort, descending: order === "desc" };
  const { list, isCurrent } = useFleet(selection, heldVms);
  const isFiltered = q !== "" || label !== "" || state !== undefined || agent !== undefined;
  useScrollToTop(list?.selection);
  return (
    <>
      <div class="heading">
        <h1 tabIndex={-1}>{texts.title}</h1>
        {list?.loaded && isCurrent && (
          <span class="count" role="status">{(isFiltered ? texts.matching : texts.count)(list.count)}</span>
        )}
        <Filters selection={selection} sorting={sorting} />
        {list?.loaded && <AddVm closed={list.refresh} />}
      </div>
      {list?.loaded && <DegradedNote degraded={list.degraded} />}
      {list?.loaded && <OutdatedParts hypervisors={list.hypervisors} />}
      {list?.loaded && list.failure && <div class="banner warn" role="status">{texts.outdated}</div>}
      {!list?.loaded ? (
        list?.failure ? <Failed failure={list.failure} retry={list.refresh} /> : <Loading rows={10} />
      ) : list.count > 0 ? (
        <VmTable list={list} sorting={sorting} sortBy={sortBy} isReplaced={!isCurrent} />
      ) : isFiltered ? (
        <Notice title={texts.noMatchTitle}>
          <p>{texts.noMatch}</p>
          <button type="button" onClick={() => adjust({ q: null, label: null, state: null, agent: null })}>{texts.showAll}</button>
        </Notice>
      ) : (
        <Notice title={texts.emptyTitle}><p>{texts.empty}</p></Notice>
      )}
    </>
  );
}

type Sorted = Selection & { sort: Column };

function selectionOf(query: URLSearchParams): Sorted {
  const known = <T extends string>(values: readonly T[], name: string) =>
    values.find((value) => value === query.get(name));
  const sort = known(COLUMNS, "sort") ?? "cpu";
  return {
    q: (query.get("q") ?? "").slice(0, MAX_SEARCH),
    state: known(STATES, "state"),
    agent: known(AGENTS, "agent"),
    label: labelOf(query.get("label") ?? ""),
    sort,
    order: known(["asc", "desc"], "order") ?? (DESCENDS[sort] ? "desc" : "asc"),
  };
}

/** The part of the input that is a valid filter by label: a label has a key. */
const labelOf = (input: string): string => input.replace(/^=+/, "").slice(0, MAX_LABEL);

/** Names the hypervisors whose VMs may be out of date, with the ages of their lists. */
function OutdatedParts({ hypervisors }: { hypervisors: Schemas["Hypervisor"][] }) {
  const texts = t().vms.outdatedPart;
  const outdated = hypervisors.filter(({ reachable, late }) => !reachable || late);
  if (outdated.length === 0) return null;
  return (
    <div class="banner warn" role="status">
      {outdated.slice(0, MAX_NAMED).map(({ name, reachable, listed_at }) => (
        <span key={name}>
          {listed_at === null ? texts.never(name)
            : (reachable ? texts.late : texts.unreachable)(name, ago(ms(listed_at), now.value))}
        </span>
      ))}
      {outdated.length > MAX_NAMED && <span>{texts.more(outdated.length - MAX_NAMED)}</span>}
    </div>
  );
}

function sortBy({ column, descending }: Sorting<Column>): void {
  adjust({ sort: column, order: descending ? "desc" : "asc" }, true);
}

/** Scrolls to the first row when another list replaces the one on the screen. */
function useScrollToTop(shown: Selection | undefined): void {
  const before = useRef(shown);
  useEffect(() => {
    if (before.current && shown !== before.current) scrollTo(0, 0);
    before.current = shown;
  }, [shown]);
}

function Filters({ selection, sorting }: { selection: Sorted; sorting: Sorting<Column> }) {
  const texts = t().vms;
  return (
    <div class="filters spread" role="search">
      <input
        type="search" aria-label={texts.search} placeholder={texts.search} value={selection.q} maxLength={MAX_SEARCH}
        onInput={(event) => adjust({ q: event.currentTarget.value || null }, true)}
      />
      <input
        type="text" class="label" aria-label={texts.label} placeholder={texts.labelHint} value={selection.label}
        maxLength={MAX_LABEL} onInput={(event) => adjust({ label: labelOf(event.currentTarget.value) || null }, true)}
      />
      <Filter name="state" label={texts.state} value={selection.state} options={STATES} texts={t().state} />
      <Filter name="agent" label={texts.agent} value={selection.agent} options={AGENTS} texts={t().agent} />
      <select
        class="narrow-only sort-by" aria-label={texts.sortBy} value={sorting.column}
        onChange={(event) => {
          const column = event.currentTarget.value as Column;
          sortBy({ column, descending: DESCENDS[column] });
        }}
      >
        {COLUMNS.map((column) => (
          <option key={column} value={column}>{t().common.labelled(texts.sortBy, texts.columns[column])}</option>
        ))}
      </select>
    </div>
  );
}

interface FilterProps<Value extends string> {
  /** Parameter in the address of the page. */
  name: string;
  label: string;
  value: Value | undefined;
  options: readonly Value[];
  texts: Record<Value, string>;
}

function Filter<Value extends string>({ name, label, value, options, texts }: FilterProps<Value>) {
  const { labelled } = t().common;
  return (
    <select
      aria-label={label} value={value ?? ""}
      onChange={(event) => adjust({ [name]: event.currentTarget.value || null }, true)}
    >
      <option value="">{labelled(label, t().vms.all)}</option>
      {options.map((option) => <option key={option} value={option}>{labelled(label, texts[option])}</option>)}
    </select>
  );
}
