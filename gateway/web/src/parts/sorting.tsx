import type { ComponentChildren } from "preact";

export interface Sorting<Column extends string> {
  column: Column;
  descending: boolean;
}

interface HeadProps<Column extends string> {
  column: Column;
  sorting: Sorting<Column>;
  /** Which way a first click sorts: numbers from the greatest, texts from their beginning. */
  descends?: boolean;
  sort: (sorting: Sorting<Column>) => void;
  class?: string;
  children: ComponentChildren;
}

/** The heading of a column that sorts by it. */
export function SortHead<Column extends string>(props: HeadProps<Column>) {
  const { column, sorting, descends = false } = props;
  const active = sorting.column === column;
  const direction = sorting.descending ? "descending" : "ascending";
  const next = { column, descending: active ? !sorting.descending : descends };
  return (
    <th scope="col" class={props.class} aria-sort={active ? direction : undefined}>
      <button type="button" class="sort" onClick={() => props.sort(next)}>
        {props.children}
        <span class="arrow" aria-hidden="true">{active ? (sorting.descending ? "↓" : "↑") : ""}</span>
      </button>
    </th>
  );
}

/** Compares values of a column; what has none comes last whichever way. */
export function compare(one: number | string | null, other: number | string | null, descending: boolean): number {
  if (one === null || other === null) return Number(one === null) - Number(other === null);
  const order = typeof one === "string" || typeof other === "string"
    ? String(one).localeCompare(String(other), undefined, { numeric: true })
    : one - other;
  return descending ? -order : order;
}
