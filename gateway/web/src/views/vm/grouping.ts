//! Groups the processes of a process table by name, by unit or container, or by user, and sums up each group.
import type { Schemas } from "../../api/client";

export type Process = Schemas["Process"];

export const GROUPINGS = ["none", "name", "unit", "user"] as const;
export type Grouping = (typeof GROUPINGS)[number];

/** The sums of the processes that share a name, a unit or container, or a user. */
export interface Group {
  /** Distinguishes the group from all others of the same grouping. */
  key: string;
  /** Null groups the processes that have no unit or container, or whose user is unknown. */
  label: string | null;
  isContainer: boolean;
  /** Number of processes. */
  count: number;
  /** Number of processes that have ended. */
  ended: number;
  cpu: number;
  mem: number;
  read: number;
  write: number;
  rows: Process[];
}

/** The number of processes that a row stands for. */
export const processesOf = (row: Process): number => row.processes ?? 1;

export function groupsOf(rows: Process[], grouping: Exclude<Grouping, "none">): Group[] {
  const groups = new Map<string, Group>();
  for (const row of rows) {
    const isContainer = grouping === "unit" && row.container !== null;
    const label = labelOf(row, grouping);
    const key = `${isContainer} ${label === null} ${label}`;
    const group = groups.get(key)
      ?? { key, label, isContainer, count: 0, ended: 0, cpu: 0, mem: 0, read: 0, write: 0, rows: [] };
    const count = processesOf(row);
    group.count += count;
    if (row.ended_at !== null) group.ended += count;
    group.cpu += row.cpu_util;
    group.mem += row.mem;
    group.read += row.disk_read;
    group.write += row.disk_write;
    group.rows.push(row);
    groups.set(key, group);
  }
  return [...groups.values()];
}

function labelOf(row: Process, grouping: Exclude<Grouping, "none">): string | null {
  switch (grouping) {
    case "name": return row.name;
    case "unit": return row.container ?? row.unit;
    case "user": return row.user;
  }
}

/** Whether the name, owner or command line of the process contains the text, which is in lower case. */
export function matches(row: Process, text: string): boolean {
  const texts = [row.name, row.user, row.unit, row.container, row.command_line];
  return texts.some((value) => value !== null && value.toLowerCase().includes(text));
}
