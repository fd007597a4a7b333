//! Converts the history of a VM into chart data: one column per measure, with gaps where there are no samples, and live
//! samples appended.
import type { Schemas } from "../../api/client";
import { ms } from "../../format";

type Stat = Schemas["Stat"];
/** Null is a gap of the line; undefined is only a time at which another line has a value. */
export type Stats = (Stat | null | undefined)[];

/** A line has a gap where the distance between two buckets exceeds the median distance by this factor. */
const GAP = 3;

/** A bucket of the API, for a VM or a process. */
export type Bucket<Measure extends string> = { at: string; count: number } & Record<Measure, Stat | null>;

export interface Columns<Measure extends string> {
  /** Unix milliseconds, ascending; includes the timestamps of gaps. */
  at: number[];
  stats: Record<Measure, Stats>;
  stepMs: number;
}

export function columns<Measure extends string>(
  buckets: Bucket<Measure>[],
  stepMs: number,
  measures: readonly Measure[],
): Columns<Measure> {
  const times = buckets.map((bucket) => ms(bucket.at));
  const distances = times.slice(1).map((time, index) => time - (times[index] ?? time)).sort((one, other) => one - other);
  const median = Math.max(stepMs, distances[Math.floor(distances.length / 2)] ?? stepMs);
  const at: number[] = [];
  const stats = Object.fromEntries(measures.map((measure) => [measure, [] as Stats])) as Record<Measure, Stats>;
  buckets.forEach((bucket, index) => {
    const time = times[index] ?? 0;
    const last = at.at(-1);
    if (last !== undefined && time - last > GAP * median) {
      at.push(last + median);
      for (const measure of measures) stats[measure].push(null);
    }
    at.push(time);
    for (const measure of measures) stats[measure].push(bucket[measure]);
  });
  return { at, stats, stepMs };
}

export type VmMeasure = Exclude<keyof Schemas["Bucket"], "at" | "count">;
// This fails to compile unless it names exactly the measures of the API.
const measures: Record<VmMeasure, true> = {
  cpu_util: true,
  mem: true,
  disk_read: true,
  disk_write: true,
  net_incoming: true,
  net_outgoing: true,
  proc: true,
  cores: true,
  steal: true,
  load: true,
  swap: true,
  pressure_cpu: true,
  pressure_mem: true,
  pressure_io: true,
};
export const VM_MEASURES = Object.keys(measures) as VmMeasure[];
type VmBucket = Bucket<VmMeasure>;

/** The values of a VM by their source, at the times of both. A source without values is null. */
export interface BySource {
  at: number[];
  agent: Record<VmMeasure, Stats> | null;
  hypervisor: Record<VmMeasure, Stats> | null;
}

/** Joins the histories of both sources. */
export function bySource(agent: Columns<VmMeasure>, hypervisor: Columns<VmMeasure>): BySource {
  if (hypervisor.at.length === 0) return { at: agent.at, agent: agent.at.length > 0 ? agent.stats : null, hypervisor: null };
  if (agent.at.length === 0) return { at: hypervisor.at, agent: null, hypervisor: hypervisor.stats };
  const at = [...new Set([...agent.at, ...hypervisor.at])].sort((one, other) => one - other);
  const spread = ({ at: times, stats }: Columns<VmMeasure>) => {
    const places = new Map(times.map((time, index) => [time, index]));
    const column = (measure: VmMeasure): Stats =>
      at.map((time) => {
        const place = places.get(time);
        return place === undefined ? undefined : stats[measure][place];
      });
    return Object.fromEntries(VM_MEASURES.map((measure) => [measure, column(measure)])) as Record<VmMeasure, Stats>;
  };
  return { at, agent: spread(agent), hypervisor: spread(hypervisor) };
}

/** Adds a live sample to its bucket or appends a new bucket; drops buckets older than `from`. */
export function withSample(
  buckets: VmBucket[], stepMs: number, sample: { at: string } & Record<VmMeasure, number | null>, from: number,
): VmBucket[] {
  const time = ms(sample.at);
  const last = buckets.at(-1);
  const begin = last ? ms(last.at) : 0;
  // Ignore a late or repeated event; the next request for the history will include its sample.
  if (last && time < begin) return buckets;
  const kept = buckets.filter((bucket) => ms(bucket.at) + stepMs >= from);
  const merge = (measure: VmMeasure): Stat | null => {
    const value = sample[measure];
    const before = last && time < begin + stepMs ? last[measure] : null;
    if (value === null) return before;
    if (!before || !last) return { min: value, avg: value, max: value };
    const avg = (before.avg * last.count + value) / (last.count + 1);
    return { min: Math.min(before.min, value), avg, max: Math.max(before.max, value) };
  };
  const merged = Object.fromEntries(VM_MEASURES.map((measure) => [measure, merge(measure)])) as Record<VmMeasure, Stat | null>;
  if (last && time < begin + stepMs) {
    kept[kept.length - 1] = { at: last.at, count: last.count + 1, ...merged };
  } else {
    const at = new Date(stepMs > 0 ? Math.floor(time / stepMs) * stepMs : time).toISOString();
    kept.push({ at, count: 1, ...merged });
  }
  return kept;
}
