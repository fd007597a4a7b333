//! The loaded rows of the VM list: the first rows of the list that the server sorts, kept up to date with live values.
import type { Schemas, Vm } from "../api/client";
import { sum } from "../format";
import { isUnstored } from "./agent-faults";

/** Where a page of the list begins. */
export interface Start {
  index: number;
  /** Reads the page; undefined for the first one. */
  cursor: string | undefined;
}

/**
 * Columns whose rows move only when the server is asked again. Names and ids do not change; by the time of the last
 * report, every VM on the screen would move up with each of its reports.
 */
const UNMOVED: ReadonlySet<Schemas["VmSort"]> = new Set(["id", "name", "hypervisor", "last_report"]);

type Value = number | string | null;

interface Row {
  vm: Vm;
  /** Time of the last live change of the state, by the clock of the browser. */
  stateAt: number;
}

export interface Sort {
  sort: Schemas["VmSort"];
  order: Schemas["Order"];
}

/** An answer of the server, and when it was requested. */
interface Answer {
  vms: Vm[];
  next: string | null;
  requestedAt: number;
}

const isCurrent = (vm: Vm): boolean => vm.agent === "reporting" && !isUnstored(vm.agent_faults);

/** Whether the values of a VM are those that its hypervisor measured, because no agent sends any. */
export const isMeasured = (vm: Vm): boolean => !isCurrent(vm) && vm.hypervisor_sample !== null;

export class Rows {
  /** Ids in the order shown. */
  private order: string[] = [];
  private readonly rows = new Map<string, Row>();
  private starts: Start[] = [];
  /** VMs whose value has changed since they were put in order. */
  private readonly moved = new Set<string>();
  /** Cursor of the rows that follow; undefined if there are none. */
  next: string | undefined = undefined;

  constructor(private readonly by: Sort) {}

  get count(): number {
    return this.order.length;
  }

  at(index: number): Vm | undefined {
    return this.rows.get(this.order[index] ?? "")?.vm;
  }

  indexOf(id: string): number {
    return this.order.indexOf(id);
  }

  /** The start of the loaded page that contains this row. */
  startOf(index: number): Start {
    return this.starts.filter((start) => start.index <= index).at(-1) ?? { index: 0, cursor: undefined };
  }

  /** The start of the page that follows the loaded rows, or undefined at the end of the list. */
  end(): Start | undefined {
    return this.next === undefined ? undefined : { index: this.count, cursor: this.next };
  }

  /**
   * Replaces the rows from `start` on by an answer. Rows behind the answer are dropped: they are read again when they
   * come into view, from where this answer ends. Held VMs keep their row.
   */
  place(start: Start, { vms, next, requestedAt }: Answer, held: readonly string[]): void {
    const seats = this.seats(held);
    const fresh = new Set(vms.map((vm) => vm.instance_id));
    const isKept = (id: string) => !fresh.has(id);
    const kept = this.order.slice(0, start.index).filter(isKept);
    this.starts = this.starts
      .filter(({ index }) => index < start.index)
      .map(({ index, cursor }) => ({ index: this.order.slice(0, index).filter(isKept).length, cursor }));
    this.starts.push({ index: kept.length, cursor: start.cursor });
    this.order = [...kept, ...fresh];
    for (const vm of vms) this.update(vm, requestedAt);
    const listed = new Set(this.order);
    for (const [id] of seats) if (!listed.has(id)) this.order.push(id);
    for (const id of this.rows.keys()) if (!listed.has(id) && !seats.has(id)) this.rows.delete(id);
    this.next = next ?? undefined;
    this.seat(seats);
  }

  /** Stores a VM of an answer; keeps live values that are newer than the answer. */
  private update(vm: Vm, requestedAt: number): void {
    const id = vm.instance_id;
    const known = this.rows.get(id);
    const stateAt = known?.stateAt ?? 0;
    let merged = vm;
    if (known && stateAt > requestedAt) merged = { ...merged, state: known.vm.state };
    if (known?.vm.sample && vm.sample && known.vm.sample.at > vm.sample.at) {
      const { sample, agent, last_report_at } = known.vm;
      merged = { ...merged, sample, agent, last_report_at };
    }
    if (known?.vm.hypervisor_sample && vm.hypervisor_sample && known.vm.hypervisor_sample.at > vm.hypervisor_sample.at) {
      merged = { ...merged, hypervisor_sample: known.vm.hypervisor_sample };
    }
    this.rows.set(id, { vm: merged, stateAt });
    if (this.value(merged) === this.value(vm)) this.moved.delete(id);
    else this.moved.add(id);
  }

  /** Changes a VM by a live event. Returns false if the VM is not loaded. */
  change(id: string, changes: Partial<Vm>): boolean {
    const row = this.rows.get(id);
    if (!row) return false;
    const vm = { ...row.vm, ...changes };
    this.rows.set(id, { vm, stateAt: "state" in changes ? Date.now() : row.stateAt });
    if (this.value(vm) !== this.value(row.vm)) this.moved.add(id);
    return true;
  }

  /** Puts VMs whose value has changed where they belong, except for held VMs. Returns whether there were any. */
  sort(held: readonly string[]): boolean {
    if (this.moved.size === 0) return false;
    this.seat(this.seats(held));
    return true;
  }

  private seats(held: readonly string[]): Map<string, number> {
    return new Map(held.map((id) => [id, this.indexOf(id)] as const).filter(([, index]) => index >= 0));
  }

  /** Merges the changed rows into the others, which keep the order of the server, and puts held VMs back into their seats. */
  private seat(seats: ReadonlyMap<string, number>): void {
    const settled: string[] = [];
    const moving: string[] = [];
    for (const id of this.order) if (!seats.has(id)) (this.moved.has(id) ? moving : settled).push(id);
    moving.sort((one, other) => this.compare(one, other));
    const order: string[] = [];
    for (const id of settled) {
      while (moving[0] !== undefined && this.compare(moving[0], id) < 0) order.push(moving.shift() ?? id);
      order.push(id);
    }
    order.push(...moving);
    for (const [id, index] of [...seats].sort(([, one], [, other]) => one - other)) order.splice(index, 0, id);
    this.order = order;
    this.moved.clear();
    if (!UNMOVED.has(this.by.sort)) for (const id of seats.keys()) this.moved.add(id);
  }

  /** Compares as the server does: VMs without a value come last, equal ones are sorted by id. */
  private compare(one: string, other: string): number {
    const [mine, others] = [one, other].map((id) => this.value(this.rows.get(id)?.vm)) as [Value, Value];
    if (mine === others) return one < other ? -1 : 1;
    if (mine === null || others === null) return mine === null ? 1 : -1;
    return (mine < others ? -1 : 1) * (this.by.order === "desc" ? -1 : 1);
  }

  /** The value by which live events move a VM; null if it has none or events do not change it. */
  private value(vm: Vm | undefined): Value {
    const sample = vm ? (isCurrent(vm) ? vm.sample : vm.hypervisor_sample) : null;
    switch (this.by.sort) {
      case "state": return vm?.state ?? null;
      case "cpu": return sample?.cpu_util ?? null;
      case "mem": return sample?.mem ?? null;
      case "net": return sample && sum(sample.net_incoming, sample.net_outgoing);
      case "disk": return sample && sum(sample.disk_read, sample.disk_write);
      default: return null;
    }
  }
}

