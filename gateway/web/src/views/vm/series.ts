//! What charts draw: buckets in columns, with breaks where nothing was reported, and live samples at their end.
import type { Schemas } from "../../api/client";
import { ms } from "../../format";

type Stat = Schemas["Stat"];
export type Stats = (Stat | null)[];

/** A line is broken where the distance of two buckets is this many times the usual one. */
const GAP = 3;

/** Buckets with these measures, as the API answers them for a VM or for processes. */
export type Bucket<Measure extends string> = { at: string; count: number } & Record<Measure, Stat | null>;

export interface Columns<Measure extends string> {
  /** Unix milliseconds, ascending; the moments of breaks among them. */
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
  const usual = Math.max(stepMs, distances[Math.floor(distances.length / 2)] ?? stepMs);
  const at: number[] = [];
  const stats = Object.fromEntries(measures.map((measure) => [measure, [] as Stats])) as Record<Measure, Stats>;
  buckets.forEach((bucket, index) => {
    const time = times[index] ?? 0;
    const last = at.at(-1);
    if (last !== undefined && time - last > GAP * usual) {
      at.push(last + usual);
      for (const measure of measures) stats[measure].push(null);
    }
    at.push(time);
    for (const measure of measures) stats[measure].push(bucket[measure]);
  });
  return { at, stats, stepMs };
}

export const VM_MEASURES = ["cpu_util", "mem", "disk_read", "disk_write", "net_incoming", "net_outgoing"] as const;
export type VmMeasure = (typeof VM_MEASURES)[number];
type VmBucket = Bucket<VmMeasure>;

/** Adds a live sample to the bucket that it belongs to, or begins one; older buckets than `from` go. */
export function withSample(buckets: VmBucket[], stepMs: number, sample: Schemas["SampleEvent"], from: number): VmBucket[] {
  const time = ms(sample.at);
  const last = buckets.at(-1);
  const begin = last ? ms(last.at) : 0;
  // Told late or told again: the next read has it.
  if (last && time < begin) return buckets;
  const kept = buckets.filter((bucket) => ms(bucket.at) + stepMs >= from);
  const of = (measure: VmMeasure): Stat => {
    const value = sample[measure];
    const before = last && time < begin + stepMs ? last[measure] : null;
    if (!before || !last) return { min: value, avg: value, max: value };
    const avg = (before.avg * last.count + value) / (last.count + 1);
    return { min: Math.min(before.min, value), avg, max: Math.max(before.max, value) };
  };
  const measures = Object.fromEntries(VM_MEASURES.map((measure) => [measure, of(measure)])) as Record<VmMeasure, Stat>;
  if (last && time < begin + stepMs) {
    kept[kept.length - 1] = { at: last.at, count: last.count + 1, ...measures };
  } else {
    const at = new Date(stepMs > 0 ? Math.floor(time / stepMs) * stepMs : time).toISOString();
    kept.push({ at, count: 1, ...measures });
  }
  return kept;
}
