//! Shows the process table at the pinned moment, otherwise at the moment under the mouse pointer, otherwise now. The
//! processes are listed one by one or in groups.
import { useMemo, useState } from "preact/hooks";
import type { Schemas } from "../../api/client";
import { ms, shortTime, whole } from "../../format";
import { t } from "../../i18n";
import { Badge } from "../../parts/badge";
import { SortHead, type Sorting } from "../../parts/sorting";
import { Failed, Loading, Notice } from "../../parts/states";
import { Choice } from "../../parts/switches";
import { adjust, route } from "../../router";
import { Accounted, HiddenNote } from "./accounted";
import { type Grouping, GROUPINGS, groupsOf, matches, type Process } from "./grouping";
import { type Moment, useMoment } from "./moment";
import { type Table, useTable } from "./process-data";
import { type Column, compareGroups, compareProcesses, FLAT, GROUPED, GroupRows, keyOf, ProcessRow } from "./process-rows";
import { unpin } from "./range";

/** Rows shown before "Show all" is clicked. */
const INITIAL_ROWS = 30;

interface ProcessTableProps extends Moment {
  id: string;
  /** Why the agent cannot see all processes, from its latest sample. */
  restricted: Schemas["Restriction"] | null;
}

export function ProcessTable({ id, restricted, ...selected }: ProcessTableProps) {
  const texts = t().table;
  const grouping = useGrouping();
  const { pinned } = selected;
  const at = useMoment(selected);
  const table = useTable(id, at, grouping !== "none");
  const [filter, setFilter] = useState("");
  const matching = useMemo(
    () => (table.data?.processes ?? []).filter((process) => matches(process, filter.toLowerCase())),
    [table.data, filter],
  );
  const sampled = table.data?.at ? ms(table.data.at) : null;
  const options = GROUPINGS.map((option) => [option, texts.groupings[option]] as const);
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
        {table.data && sampled !== null && <Accounted table={table.data} />}
      </div>
      <HiddenNote restricted={restricted} />
      <div class="tools">
        <Choice
          label={texts.groupBy} options={options} value={grouping}
          choose={(option) => adjust({ group: option === "none" ? null : option }, true)}
        />
        <input
          type="search" aria-label={texts.filter} placeholder={texts.filter} value={filter}
          onInput={(event) => setFilter(event.currentTarget.value)}
        />
      </div>
      {!table.data ? (
        table.failure ? <Failed failure={table.failure} retry={table.reload} /> : <Loading />
      ) : table.data.processes.length === 0 ? (
        <Notice title={texts.emptyTitle}><p>{texts.empty}</p></Notice>
      ) : matching.length === 0 ? (
        <p class="faint">{texts.noMatch}</p>
      ) : (
        <>
          {grouping === "none" ? (
            <FlatTable processes={matching} sampled={sampled ?? 0} loading={table.loading} />
          ) : (
            <GroupedTable key={grouping} processes={matching} grouping={grouping} sampled={sampled ?? 0} loading={table.loading} />
          )}
          <CutNote table={table.data} />
        </>
      )}
    </section>
  );
}

/** Says that not all processes of the moment were read. */
function CutNote({ table }: { table: Table }) {
  const read = table.processes.length;
  return read < table.total ? <p class="faint cut">{t().table.cut(whole(read), whole(table.total))}</p> : null;
}

interface ListProps {
  processes: Process[];
  sampled: number;
  loading: boolean;
}

function FlatTable({ processes, sampled, loading }: ListProps) {
  const [sorting, setSorting] = useState<Sorting<Column>>({ column: "cpu", descending: true });
  const [all, setAll] = useState(false);
  const sorted = useMemo(
    () => [...processes].sort((one, other) => compareProcesses(one, other, sorting)),
    [processes, sorting],
  );
  const shown = all ? sorted : sorted.slice(0, INITIAL_ROWS);
  return (
    <>
      <table class="process flat" aria-busy={loading}>
        <Head columns={FLAT} sorting={sorting} sort={setSorting} name={t().table.columns.name} />
        <tbody>
          {shown.map((process) => (
            <ProcessRow key={keyOf(process)} process={process} sampled={sampled} />
          ))}
        </tbody>
      </table>
      {shown.length < sorted.length && <ShowAll count={sorted.length} show={() => setAll(true)} />}
    </>
  );
}

function GroupedTable({ processes, grouping, sampled, loading }: ListProps & { grouping: Exclude<Grouping, "none"> }) {
  const [sorting, setSorting] = useState<Sorting<Column>>({ column: "cpu", descending: true });
  const [all, setAll] = useState(false);
  const [unfolded, setUnfolded] = useState<ReadonlySet<string>>(new Set());
  const groups = useMemo(
    () => groupsOf(processes, grouping).sort((one, other) => compareGroups(one, other, sorting)),
    [processes, grouping, sorting],
  );
  const shown = all ? groups : groups.slice(0, INITIAL_ROWS);
  const toggle = (key: string) =>
    setUnfolded((before) => new Set(before.has(key) ? [...before].filter((other) => other !== key) : [...before, key]));
  return (
    <>
      <table class="process grouped" aria-busy={loading}>
        <Head columns={GROUPED} sorting={sorting} sort={setSorting} name={t().table.groups.heading[grouping]} />
        <tbody>
          {shown.map((group) => (
            <GroupRows
              key={group.key} group={group} grouping={grouping} sampled={sampled}
              unfolded={unfolded.has(group.key)} toggle={() => toggle(group.key)}
            />
          ))}
        </tbody>
      </table>
      {shown.length < groups.length && <ShowAll count={groups.length} show={() => setAll(true)} />}
    </>
  );
}

interface HeadProps {
  columns: readonly Column[];
  sorting: Sorting<Column>;
  sort: (sorting: Sorting<Column>) => void;
  /** Heading of the first column. */
  name: string;
}

const TEXT_COLUMNS: readonly Column[] = ["name", "user", "unit"];

function Head({ columns, sorting, sort, name }: HeadProps) {
  const texts = t().table.columns;
  return (
    <thead>
      <tr>
        {columns.map((column) => (
          <SortHead
            key={column} column={column} sorting={sorting} sort={sort}
            descends={![...TEXT_COLUMNS, "pid"].includes(column)}
            class={TEXT_COLUMNS.includes(column) ? column : `number ${column}`}
          >
            {column === "name" ? name : texts[column]}
          </SortHead>
        ))}
      </tr>
    </thead>
  );
}

function ShowAll({ count, show }: { count: number; show: () => void }) {
  return <button type="button" class="more" onClick={show}>{t().table.showAll(count)}</button>;
}

function useGrouping(): Grouping {
  const asked = route.value.query.get("group");
  return GROUPINGS.find((grouping) => grouping === asked) ?? "none";
}
