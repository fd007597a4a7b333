import { signal } from "@preact/signals";

/** The current time, updated every second while the page is visible; drives relative times. */
export const now = signal(Date.now());

setInterval(() => {
  if (!document.hidden) now.value = Date.now();
}, 1_000);
