import { percent } from "../format";

/** A percentage as a number with a bar; values above 100% fill the bar. */
export function Meter({ value, hot = 80 }: { value: number; hot?: number }) {
  return (
    <span class={value >= hot ? "meter hot" : "meter"}>
      <span class="bar" aria-hidden="true"><span style={{ width: `${Math.min(100, Math.max(0, value))}%` }} /></span>
      <span class="number">{percent(value)}</span>
    </span>
  );
}
