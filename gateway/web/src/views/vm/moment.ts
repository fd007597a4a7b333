//! The moment whose processes and filesystems the view of a VM shows.
import type { Signal } from "@preact/signals";
import { useEffect, useState } from "preact/hooks";

/** How long the pointer must rest before the data of its moment is read. */
const DEBOUNCE_MS = 80;

export interface Moment {
  /** The point of the chart under the pointer, or null. */
  hover: Signal<number | null>;
  /** The moment that a point of the chart stands for. */
  moment: (at: number) => number;
  pinned: number | null;
  live: boolean;
  /** The end of the selected range; the default moment when not live. */
  to: number;
}

/** The selected moment; null means now. */
export function useMoment({ hover, moment, pinned, live, to }: Moment): number | null {
  const pointed = useDebounced(hover.value);
  return pinned ?? (pointed !== null ? moment(pointed) : live ? null : Math.min(to, Date.now()));
}

/** Debounces changes of the value; null takes effect immediately. */
function useDebounced(value: number | null): number | null {
  const [settled, setSettled] = useState(value);
  useEffect(() => {
    const timer = setTimeout(() => setSettled(value), DEBOUNCE_MS);
    return () => clearTimeout(timer);
  }, [value]);
  return value === null ? null : settled;
}
