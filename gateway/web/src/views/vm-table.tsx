//! The table of VMs. Only the rows on the screen are in the DOM, and the row that has the focus.
import type { JSX } from "preact";
import { useEffect, useLayoutEffect, useRef } from "preact/hooks";
import { may, type Vm } from "../api/client";
import { watch } from "../api/live";
import { t } from "../i18n";
import { SortHead, type Sorting } from "../parts/sorting";
import { useWindow } from "../parts/window";
import type { VmList } from "./fleet";
import { VmRow } from "./vm-row";

export const COLUMNS = ["name", "state", "cpu", "mem", "net", "disk", "last_report"] as const;
export type Column = (typeof COLUMNS)[number];
export const DESCENDS: Record<Column, boolean> = {
  name: false, state: false, cpu: true, mem: true, net: true, disk: true, last_report: true,
};
/** Row 1 is the header. */
const FIRST_ROW = 2;

/** The VMs under the pointer and with the focus: the user would lose them if they moved. */
export function heldVms(): string[] {
  const rows = [...document.querySelectorAll<HTMLElement>(".vms tbody tr:hover"), rowOf(document.activeElement)];
  return [...new Set(rows.flatMap((row) => row?.dataset["vm"] ?? []))];
}

const rowOf = (element: Element | null): HTMLElement | null =>
  element?.closest<HTMLElement>(".vms tbody tr[data-vm]") ?? null;

interface TableProps {
  list: VmList;
  sorting: Sorting<Column>;
  sortBy: (sorting: Sorting<Column>) => void;
  /** The list of another selection is loading and will replace this one. */
  isReplaced: boolean;
}

export function VmTable({ list, sorting, sortBy, isReplaced }: TableProps) {
  const texts = t().vms.columns;
  const body = useRef<HTMLTableSectionElement>(null);
  const { rows, count } = list;
  const { first, last, height } = useWindow(body, count);
  const acts = may("operator");
  useKeptFocus();
  const indices = Array.from({ length: last - first }, (_, offset) => first + offset);
  const vms = indices.flatMap((index) => rows.at(index) ?? []);
  useEffect(() => list.show(first, last), [list, first, last]);
  useEffect(() => watch(vms.map((vm) => vm.instance_id)), [vms.map((vm) => vm.instance_id).join()]);
  useEffect(() => () => watch([]), []);
  const focused = rows.indexOf(rowOf(document.activeElement)?.dataset["vm"] ?? "");
  if (focused >= 0 && (focused < first || focused >= last)) indices.push(focused);
  indices.sort((one, other) => one - other);
  const head = (column: Column, kind: string = column) => (
    <SortHead column={column} sorting={sorting} descends={DESCENDS[column]} sort={sortBy} class={kind}>
      {texts[column]}
    </SortHead>
  );
  return (
    <table
      class={isReplaced ? "vms replaced" : "vms"} aria-rowcount={count + 1}
      aria-busy={isReplaced || vms.length < last - first}
    >
      <thead>
        <tr aria-rowindex={1}>
          {head("name")}
          {head("state")}
          {head("cpu", "number cpu")}
          <th scope="col" class="hour">{texts.hour}</th>
          {head("mem", "number mem")}
          {head("net", "number net")}
          {head("disk", "number disk")}
          {head("last_report", "report")}
          {acts && <th scope="col" class="act"><span class="hidden">{texts.action}</span></th>}
        </tr>
      </thead>
      <tbody ref={body} onKeyDown={moveFocus}>
        {withSpacers(indices, count, height, (index) => bodyRow(rows.at(index), index + FIRST_ROW, acts))}
      </tbody>
    </table>
  );
}

function bodyRow(vm: Vm | undefined, index: number, acts: boolean): JSX.Element {
  if (vm) return <VmRow key={vm.instance_id} vm={vm} index={index} acts={acts} />;
  return (
    <tr key={`pending ${index}`} class="pending" aria-rowindex={index}>
      <td colSpan={acts ? 9 : 8}><div class="bone" /><span class="hidden">{t().common.loading}</span></td>
    </tr>
  );
}

/** Renders these rows, and spacers as high as the rows that are left out. */
function withSpacers(
  indices: number[], count: number, height: number, render: (index: number) => JSX.Element,
): JSX.Element[] {
  const elements: JSX.Element[] = [];
  let end = 0;
  const space = (to: number) => {
    if (to === end) return;
    const key = `spacer ${elements.length === 0 ? "above" : to === count ? "below" : "between"}`;
    const style = { height: `${(to - end) * height}px` };
    elements.push(<tr key={key} class="spacer" style={style} aria-hidden="true"><td /></tr>);
  };
  for (const index of indices) {
    space(index);
    elements.push(render(index));
    end = index + 1;
  }
  space(count);
  return elements;
}

/** Restores the focus after a render: an element that is moved within the document loses it. */
function useKeptFocus(): void {
  const row = rowOf(document.activeElement);
  const focused = row && document.activeElement;
  useLayoutEffect(() => {
    if (focused instanceof HTMLElement && focused.isConnected && document.activeElement !== focused) {
      focused.focus({ preventScroll: true });
    }
  });
}

/** Moves the focus between VMs with the arrow keys. */
function moveFocus(event: KeyboardEvent): void {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const row = rowOf(document.activeElement);
  if (!step || !row || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
  const index = Number(row.getAttribute("aria-rowindex")) + step;
  const link = row.parentElement?.querySelector<HTMLElement>(`tr[aria-rowindex="${index}"] a`);
  if (!link) return;
  event.preventDefault();
  link.focus();
}
