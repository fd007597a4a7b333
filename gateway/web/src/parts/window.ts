//! Virtual scrolling: only the table rows that are visible on the screen are in the DOM.
import type { RefObject } from "preact";
import { useLayoutEffect, useState } from "preact/hooks";

/** Rows rendered beyond each edge, so that fast scrolling shows no gap. */
const OVERSCAN = 12;
const DEFAULT_HEIGHT = 48;

export interface Window {
  /** Index of the first rendered row. */
  first: number;
  /** Index after that of the last rendered row. */
  last: number;
  /** Height of a row in pixels. */
  height: number;
}

/** The range of rows on the screen, out of `count` rows of equal height in `body`. */
export function useWindow(body: RefObject<HTMLElement | null>, count: number): Window {
  const [view, setView] = useState({ first: 0, last: 30, height: DEFAULT_HEIGHT });
  useLayoutEffect(() => {
    const update = () => {
      const element = body.current;
      if (!element) return;
      const row = element.querySelector("tr:not(.spacer)");
      const height = row?.getBoundingClientRect().height || DEFAULT_HEIGHT;
      const top = element.getBoundingClientRect().top;
      const first = Math.max(0, Math.floor(-top / height) - OVERSCAN);
      const last = Math.max(0, Math.ceil((innerHeight - top) / height)) + OVERSCAN;
      setView((seen) =>
        seen.first === first && seen.last === last && seen.height === height ? seen : { first, last, height });
    };
    update();
    addEventListener("scroll", update, { passive: true });
    addEventListener("resize", update);
    return () => {
      removeEventListener("scroll", update);
      removeEventListener("resize", update);
    };
  }, [count]);
  const first = Math.min(view.first, Math.max(0, count - 1));
  const last = Math.min(count, Math.max(view.last, first + 1));
  return { first, last, height: view.height };
}
