//! The list of VMs: the server searches, filters and sorts it; its rows are loaded as they come into view, and are kept
//! up to date with live events and by reading the rows on the screen again.
import { useEffect, useRef, useState } from "preact/hooks";
import { api, ask, type Failure, type Schemas, type Vm } from "../api/client";
import { onEvent } from "../api/live";
import { failureFrom, READ_TIMEOUT_MS } from "../api/resource";
import { Rows, type Sort, type Start } from "./rows";

/** Rows of the first page, which should be on the screen soon. */
const FIRST_PAGE = 100;
/** Limits of the number of rows of further pages. */
const SHORTEST_PAGE = 200;
const LONGEST_PAGE = 400;
/** The API returns at most this many rows. */
const MAX_LIMIT = 1000;
/** Rows loaded below those on the screen. */
const AHEAD = 60;
/** The rows on the screen are read again at this interval: live events do not tell of new, removed and silent VMs. */
const REFRESH_MS = 6_000;
/** Shortest time until rows on the screen are read again after a VM has changed its state. */
const OUTDATED_MS = 1_000;
/** Interval at which live values move rows. */
const SORT_MS = 3_000;
/** VMs may report many times a second; the list is drawn at this interval. */
const DRAW_MS = 250;
/** A search is sent when the user has stopped typing for this time. */
const TYPING_MS = 250;

/** What the user has selected of all VMs. */
export interface Selection extends Sort {
  q: string;
  state: Schemas["MachineState"] | undefined;
  agent: Schemas["AgentFilter"] | undefined;
  /** `key` or `key=value`; empty for all VMs. */
  label: string;
}

/** Ids of the VMs whose rows must not move now. */
export type Held = () => string[];

/** The VMs of one selection. It sends one request at a time, and aborts it only when another selection replaces it. */
export class VmList {
  readonly rows: Rows;
  loaded = false;
  degraded: Schemas["Degraded"][] = [];
  hypervisors: Schemas["Hypervisor"][] = [];
  failure: Failure | undefined;
  private total = 0;
  private reading = false;
  private readAt = 0;
  /** A VM on the screen has changed its state since its row was requested. */
  private outdated = false;
  private sortedAt = 0;
  private view = { first: 0, last: 0 };
  private readonly stop = new AbortController();
  private drawing: ReturnType<typeof setTimeout> | undefined;

  constructor(readonly selection: Selection, private readonly held: Held, private readonly draw: () => void) {
    this.rows = new Rows(selection);
  }

  /** Loads the list and keeps it up to date. Returns the function that stops it. */
  follow(): () => void {
    const timer = setInterval(() => document.hidden || this.tick(), 1_000);
    const stops = [
      onEvent("sample", ({ instance_id, ...sample }) =>
        this.change(instance_id, { sample, agent: "reporting", last_report_at: new Date().toISOString() })),
      onEvent("hypervisor_sample", ({ instance_id, ...sample }) =>
        this.change(instance_id, { hypervisor_sample: { ...sample, restricted: null } })),
      onEvent("machine", ({ instance_id, state }) => this.changeState(instance_id, state)),
      onEvent("operation", ({ instance_id, machine_state }) => {
        if (machine_state) this.changeState(instance_id, machine_state);
      }),
    ];
    this.refresh();
    return () => {
      this.stop.abort();
      clearInterval(timer);
      clearTimeout(this.drawing);
      stops.forEach((stop) => stop());
    };
  }

  /** Number of VMs in the list, whether loaded or not. */
  get count(): number {
    const { count, next } = this.rows;
    return next === undefined ? count : Math.max(this.total, count + 1);
  }

  /** Notes which rows are on the screen, and loads those that are missing. */
  show(first: number, last: number): void {
    this.view = { first, last };
    if (!this.failure) this.loadMissing();
  }

  /** Reads the rows on the screen again. */
  readonly refresh = (): void => {
    const last = Math.max(this.rows.count - 1, 0);
    const start = this.rows.startOf(Math.min(this.view.first, last));
    const wanted = this.view.last + AHEAD - start.index;
    void this.read(start, Math.min(MAX_LIMIT, Math.max(FIRST_PAGE, wanted)));
  };

  private loadMissing(): boolean {
    const missing = this.view.last + AHEAD - this.rows.count;
    const end = this.rows.end();
    if (missing <= 0 || !end) return false;
    void this.read(end, Math.min(LONGEST_PAGE, Math.max(SHORTEST_PAGE, missing)));
    return true;
  }

  private tick(): void {
    const now = Date.now();
    if (!this.reading && now - this.readAt >= (this.outdated ? OUTDATED_MS : REFRESH_MS)) {
      if (!this.loadMissing()) this.refresh();
    } else if (now - this.sortedAt >= SORT_MS) {
      this.sortedAt = now;
      if (this.rows.sort(this.held())) this.draw();
    }
  }

  private async read(start: Start, limit: number): Promise<void> {
    if (this.reading) return;
    this.reading = true;
    this.outdated = false;
    const requestedAt = Date.now();
    const { q, state, agent, label, sort, order } = this.selection;
    const query = {
      sort, order, limit, ...(q && { q }), ...(state && { state }), ...(agent && { agent }),
      ...(label && { label }),
      ...(start.cursor !== undefined && { cursor: start.cursor }),
    };
    const signal = AbortSignal.any([this.stop.signal, AbortSignal.timeout(READ_TIMEOUT_MS)]);
    try {
      const page = await ask(api.GET("/api/v1/vms", { params: { query }, signal }));
      const { vms, next, total, degraded, hypervisors } = page;
      if (this.stop.signal.aborted) return;
      this.rows.place(start, { vms, next, requestedAt }, this.held());
      Object.assign(this, { total, degraded, hypervisors, loaded: true, failure: undefined });
    } catch (error) {
      if (this.stop.signal.aborted) return;
      this.failure = failureFrom(error);
    } finally {
      this.reading = false;
    }
    this.readAt = this.sortedAt = Date.now();
    this.rows.sort(this.held());
    this.draw();
    if (!this.failure) this.loadMissing();
  }

  /** Shows the new state, and reads the rows on the screen again soon for the actions that it allows. */
  private changeState(id: string, state: Vm["state"]): void {
    const index = this.rows.indexOf(id);
    if (index >= this.view.first && index < this.view.last) this.outdated = true;
    // If several hypervisors have the VM, the event may be of another one than the one whose state is shown.
    if (index >= 0 && this.rows.at(index)?.copies.length === 0) this.change(id, { state });
  }

  private change(id: string, changes: Partial<Vm>): void {
    if (!this.rows.change(id, changes)) return;
    this.drawing ??= setTimeout(() => {
      this.drawing = undefined;
      this.draw();
    }, DRAW_MS);
  }
}

/** The list of the selected VMs, or the previous list until the first rows of the selected one have arrived. */
export function useFleet(selection: Selection, held: Held): { list: VmList | undefined; isCurrent: boolean } {
  const [, draw] = useState(0);
  const shown = useRef<VmList | undefined>(undefined);
  const key = JSON.stringify(selection);
  const before = useRef(selection);
  useEffect(() => {
    let stop = () => undefined as void;
    const begin = () => {
      const list = new VmList(selection, held, () => {
        shown.current = list;
        draw((count) => count + 1);
      });
      stop = list.follow();
    };
    const isTyping = before.current.q !== selection.q || before.current.label !== selection.label;
    before.current = selection;
    const timer = setTimeout(begin, isTyping ? TYPING_MS : 0);
    return () => {
      clearTimeout(timer);
      stop();
    };
  }, [key]);
  return { list: shown.current, isCurrent: JSON.stringify(shown.current?.selection) === key };
}
