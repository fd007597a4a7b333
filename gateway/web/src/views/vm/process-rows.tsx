//! Rows of the process table: processes, or groups of processes that unfold.
import type { Sorting } from "../../parts/sorting";
import { Badge } from "../../parts/badge";
import { Meter } from "../../parts/meter";
import { compare } from "../../parts/sorting";
import { duration, ms, rate, visible, whole } from "../../format";
import { t } from "../../i18n";
import { adjust, route } from "../../router";
import type { Group, Grouping, Process } from "./grouping";

export const COLUMNS = ["name", "pid", "count", "user", "unit", "cpu", "mem", "read", "write", "age"] as const;
export type Column = (typeof COLUMNS)[number];

/** Columns of the flat table; a group has the number of its processes instead of what differs among them. */
export const FLAT: readonly Column[] = ["name", "pid", "user", "unit", "cpu", "mem", "read", "write", "age"];
export const GROUPED: readonly Column[] = ["name", "count", "cpu", "mem", "read", "write"];

/** Processes listed below an unfolded group, those with the highest CPU usage. */
const UNFOLDED_ROWS = 20;

interface RowsProps {
  sampled: number;
}

export function ProcessRow({ process, sampled, inGroup = false }: RowsProps & { process: Process; inGroup?: boolean }) {
  const { name } = process;
  // A sum has no pid, so its history is that of all processes with the name.
  const pid = process.pid === null ? null : String(process.pid);
  const { query } = route.value;
  const chosen = query.get("process") === name && query.get("pid") === pid;
  const ended = process.ended_at !== null;
  const classes = [chosen && "chosen", ended && "ended", inGroup && "member"].filter(Boolean).join(" ");
  const owner = process.container ?? process.unit;
  return (
    <tr class={classes} data-pid={pid}>
      <th scope="row" class="name">
        <div class="named">
          <button
            type="button" class="link" aria-label={t().table.historyOf(name, process.pid)} aria-pressed={chosen}
            title={[name, process.command_line ?? ""].filter(Boolean).map(visible).join("\n")}
            onClick={() => adjust(chosen ? { process: null, pid: null } : { process: name, pid })}
          >
            <span>{visible(name)}</span>
          </button>
          {ended && <Badge tone="quiet">{t().table.ended}</Badge>}
          {process.kind === "sum" && <Badge tone="quiet">{t().table.sum(process.processes)}</Badge>}
        </div>
      </th>
      <td class="number pid">{inGroup && pid !== null && <span class="faint">{t().table.columns.pid} </span>}{pid}</td>
      {!inGroup && <TextCell kind="user" text={process.user} />}
      {!inGroup && <TextCell kind="unit" text={owner} />}
      <td class="number cpu"><Meter value={process.cpu_util} /></td>
      <td class="number mem"><Meter value={process.mem} hot={50} /></td>
      <td class="number read">{rate(process.disk_read)}</td>
      <td class="number write">{rate(process.disk_write)}</td>
      {!inGroup && <td class="number age">{process.started_at !== null && duration(ageOf(process, process.started_at, sampled))}</td>}
    </tr>
  );
}

function TextCell({ kind, text }: { kind: string; text: string | null }) {
  if (text === null) return <td class={kind}><span class="faint">{t().common.none}</span></td>;
  return <td class={kind} title={visible(text)}><span>{visible(text)}</span></td>;
}

interface GroupProps extends RowsProps {
  group: Group;
  grouping: Exclude<Grouping, "none">;
  unfolded: boolean;
  toggle: () => void;
}

export function GroupRows({ group, grouping, sampled, unfolded, toggle }: GroupProps) {
  const texts = t().table;
  const label = group.label === null ? texts.groups.without[grouping] : visible(group.label);
  const members = unfolded ? [...group.rows].sort((one, other) => compareProcesses(one, other, BY_CPU)) : [];
  const more = members.slice(UNFOLDED_ROWS).length;
  return (
    <>
      <tr class="group">
        <th scope="row" class="name">
          <div class="named">
            <button type="button" class="fold" title={label} aria-expanded={unfolded} onClick={toggle}>
              <span class="caret" aria-hidden="true">▸</span>
              <span class={group.label === null ? "faint" : undefined}>
                {label} <span class="times">×{whole(group.count)}</span>
              </span>
            </button>
            {group.isContainer && <Badge tone="busy">{texts.container}</Badge>}
            {group.ended > 0 && <Badge tone="quiet">{texts.groups.ended(group.ended, group.count)}</Badge>}
          </div>
        </th>
        <td class="number count">{whole(group.count)}</td>
        <td class="number cpu"><Meter value={group.cpu} /></td>
        <td class="number mem"><Meter value={group.mem} hot={50} /></td>
        <td class="number read">{rate(group.read)}</td>
        <td class="number write">{rate(group.write)}</td>
      </tr>
      {members.slice(0, UNFOLDED_ROWS).map((process) => (
        <ProcessRow key={keyOf(process)} process={process} sampled={sampled} inGroup />
      ))}
      {more > 0 && <tr class="member"><td class="faint" colSpan={GROUPED.length}>{texts.groups.more(more)}</td></tr>}
    </>
  );
}

const BY_CPU: Sorting<Column> = { column: "cpu", descending: true };

export const keyOf = (process: Process): string =>
  process.kind === "sum" ? `${process.name} ${process.user}` : `${process.pid} ${process.started_at}`;

const ageOf = (process: Process, started: string, sampled: number): number =>
  Math.max(0, (process.ended_at === null ? sampled : ms(process.ended_at)) - ms(started));

export const compareProcesses = (one: Process, other: Process, { column, descending }: Sorting<Column>): number =>
  compare(valueOf(one, column), valueOf(other, column), descending) || (one.pid ?? Infinity) - (other.pid ?? Infinity) || 0;

function valueOf(process: Process, column: Column): number | string | null {
  switch (column) {
    case "name": return process.name;
    case "pid": return process.pid;
    case "user": return process.user;
    case "unit": return process.container ?? process.unit;
    case "mem": return process.mem;
    case "read": return process.disk_read;
    case "write": return process.disk_write;
    case "age": return process.started_at === null ? null : -ms(process.started_at);
    // A flat table has no counts.
    case "count": case "cpu": return process.cpu_util;
  }
}

export const compareGroups = (one: Group, other: Group, { column, descending }: Sorting<Column>): number =>
  compare(sumOf(one, column), sumOf(other, column), descending) || compare(one.label, other.label, false);

function sumOf(group: Group, column: Column): number | string | null {
  switch (column) {
    case "name": return group.label;
    case "count": return group.count;
    case "mem": return group.mem;
    case "read": return group.read;
    case "write": return group.write;
    // The other columns are not those of groups.
    default: return group.cpu;
  }
}
