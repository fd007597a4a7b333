//! Only the rows that are on the screen are in the document, so that a thousand cost what thirty do.
import type { RefObject } from "preact";
import { useLayoutEffect, useState } from "preact/hooks";

/** Rows beyond the edges, so that a quick scroll shows no void. */
const BEYOND = 12;
const USUAL_HEIGHT = 48;

interface Window {
  first: number;
  last: number;
  /** Heights of what is left out, in pixels. */
  before: number;
  behind: number;
}

/** Which of `count` rows of equal height in `body` are on the screen. */
export function useWindow(body: RefObject<HTMLElement | null>, count: number): Window {
  const [view, setView] = useState({ first: 0, last: 40, height: USUAL_HEIGHT });
  useLayoutEffect(() => {
    const look = () => {
      const element = body.current;
      if (!element) return;
      const row = element.querySelector<HTMLElement>("tr:not(.spacer)");
      const height = row?.offsetHeight || USUAL_HEIGHT;
      const top = element.getBoundingClientRect().top;
      const first = Math.max(0, Math.floor(-top / height) - BEYOND);
      const last = Math.max(0, Math.ceil((innerHeight - top) / height)) + BEYOND;
      setView((seen) =>
        seen.first === first && seen.last === last && seen.height === height ? seen : { first, last, height });
    };
    look();
    addEventListener("scroll", look, { passive: true });
    addEventListener("resize", look);
    return () => {
      removeEventListener("scroll", look);
      removeEventListener("resize", look);
    };
  }, [count]);
  const first = Math.min(view.first, Math.max(0, count - 1));
  const last = Math.min(count, Math.max(view.last, first + 1));
  return { first, last, before: first * view.height, behind: (count - last) * view.height };
}
