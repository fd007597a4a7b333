import type { ComponentChildren } from "preact";

export interface Sorting<Column extends string> {
  column: Column;
  descending: boolean;
}

interface HeadProps<Column extends string> {
  column: Column;
  sorting: Sorting<Column>;
  /** Whether the first click sorts in descending order, as is usual for numbers. */
  descends?: boolean;
  sort: (sorting: Sorting<Column>) => void;
  class?: string;
  children: ComponentChildren;
}

/** A column heading that sorts the table when clicked. */
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

/** Compares two values of a column; null sorts last in either direction. */
export function compare(one: number | string | null, other: number | string | null, descending: boolean): number {
  if (one === null || other === null) return Number(one === null) - Number(other === null);
  const order = typeof one === "string" || typeof other === "string"
    ? String(one).localeCompare(String(other), undefined, { numeric: true })
    : one - other;
  return descending ? -order : order;
}
