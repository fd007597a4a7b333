//! Time range of the charts, live or in the past. It is stored in the URL.
import { useMemo } from "preact/hooks";
import { now } from "../../clock";
import { DAY, HOUR, MINUTE } from "../../format";
import { adjust, route } from "../../router";

export const RANGES = {
  "15m": 15 * MINUTE,
  "1h": HOUR,
  "6h": 6 * HOUR,
  "24h": DAY,
  "7d": 7 * DAY,
  "30d": 30 * DAY,
  "1y": 365 * DAY,
} as const;

export type RangeName = keyof typeof RANGES;

/** The narrowest range that a zoom can select. */
const MIN_RANGE_MS = 10_000;

export interface Range {
  /** The chosen length; restored when a zoom or pin ends. */
  name: RangeName;
  /** The range ends now and advances with the clock. */
  live: boolean;
  from: number;
  to: number;
  /** The pinned moment, if any. */
  pin: number | null;
  /** Whether the URL has a moment that is not a time, so that the view is live instead. */
  isUnreadable: boolean;
}

const isName = (text: string | null): text is RangeName => text !== null && text in RANGES;

/** The latest moment that a Date can hold. */
const MAX_MOMENT = 8.64e15;

/** A moment in the URL: RFC 3339, or Unix milliseconds as links of Grafana have them. */
function moment(query: URLSearchParams, name: string): number | null {
  const given = query.get(name) ?? "";
  const value = /^\d{9,16}$/.test(given) ? Number(given) : Date.parse(given);
  return value <= MAX_MOMENT ? value : null;
}

export function useRange(): Range {
  const { query } = route.value;
  const chosen = query.get("range");
  const name = isName(chosen) ? chosen : "1h";
  const from = moment(query, "from");
  const to = moment(query, "to");
  const pin = moment(query, "at");
  const isGiven = from !== null && to !== null && from < to;
  const live = !isGiven && pin === null;
  // Recompute a live time range only when its length changes; new samples move the charts forward without it.
  const end = useMemo(() => now.peek(), [name, live, query]);
  // A link to a moment need not have a range: the moment is then in its middle, as far as the past allows.
  const last = pin === null ? end : Math.min(end, pin + RANGES[name] / 2);
  const range = isGiven ? { from, to } : { from: last - RANGES[name], to: last };
  return { name, live, pin, isUnreadable: query.has("at") && pin === null, ...range };
}

const text = (at: number): string => new Date(at).toISOString();
const LIVE = { from: null, to: null, at: null, held: null };

export const show = (name: RangeName): void => adjust({ ...LIVE, range: name });

/** Zooms to the time between two moments; keeps the pin. */
export function showBetween(from: number, to: number): void {
  const middle = (from + to) / 2;
  const half = Math.max(MIN_RANGE_MS, to - from) / 2;
  adjust({ from: text(middle - half), to: text(Math.min(middle + half, Date.now())), held: null });
}

export function shift({ from, to }: Range, share: number): void {
  const distance = (to - from) * share;
  if (to + distance >= Date.now()) adjust(LIVE);
  else adjust({ ...LIVE, from: text(from + distance), to: text(to + distance) });
}

/** Pins a moment and the range around it, so that a shared URL shows both. */
export function pin(range: Range, at: number): void {
  const changes = { at: text(at), from: text(range.from), to: text(range.to), range: range.name };
  adjust(range.live ? { ...changes, held: "1" } : changes, range.pin !== null);
}

/** Unpins; returns to the live range if the pin had stopped it. */
export const unpin = (): void => adjust(route.peek().query.has("held") ? LIVE : { at: null });

export const backToLive = (): void => adjust(LIVE);
