//! The two moments of a VM that are compared. They are stored in the URL.
import { MINUTE } from "../../format";
import { adjust, route } from "../../router";
import type { Range } from "./range";

/** Distance of the compared moments from a mark. */
const AROUND_MS = 2 * MINUTE;

export interface Compared {
  before: number;
  after: number;
}

const text = (at: number): string => new Date(at).toISOString();

/** The moments to compare; null if none are chosen. */
export function compared(): Compared | null {
  const { query } = route.value;
  const [before, after] = ["before", "after"].map((name) => Date.parse(query.get(name) ?? ""));
  if (before === undefined || after === undefined || Number.isNaN(before) || Number.isNaN(after)) return null;
  return { before, after };
}

export const compare = ({ before, after }: Compared): void => adjust({ before: text(before), after: text(after) }, compared() !== null);

/** Compares the start of the range with the pinned moment, or else with the end of the range. */
export const compareRange = ({ from, to, pin }: Range): void =>
  open({ before: from, after: pin !== null && pin > from ? pin : Math.min(to, Date.now()) });

/** Compares the moments shortly before and after another one. */
export const compareAround = (at: number): void =>
  open({ before: at - AROUND_MS, after: Math.min(at + AROUND_MS, Date.now()) });

/** Compares two moments, and scrolls to the comparison, which is below the charts. */
function open(moments: Compared): void {
  compare(moments);
  requestAnimationFrame(() => {
    const heading = document.querySelector<HTMLElement>(".changes h2");
    heading?.focus({ preventScroll: true });
    heading?.scrollIntoView();
  });
}

export const compareNothing = (): void => adjust({ before: null, after: null });

/** The value of an input of the type `datetime-local`, in the time zone of the browser. */
export function localText(at: number): string {
  const local = new Date(at - new Date(at).getTimezoneOffset() * MINUTE);
  return local.toISOString().slice(0, 19);
}
