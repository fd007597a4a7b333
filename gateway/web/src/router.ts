//! The address says what is shown, so that it can be shared and Back goes back.
import { signal } from "@preact/signals";

interface Place {
  path: string;
  query: URLSearchParams;
}

const here = (): Place => ({ path: location.pathname, query: new URLSearchParams(location.search) });

export const place = signal<Place>(here());

/** Goes to an address of the page; `replace` leaves no trace for Back. */
export function go(address: string, replace = false): void {
  if (address === location.pathname + location.search) return;
  if (replace) history.replaceState(null, "", address);
  else history.pushState(null, "", address);
  const path = place.peek().path;
  place.value = here();
  if (place.peek().path !== path) {
    scrollTo(0, 0);
    // Who reads with a screen reader is told of the new view by its heading.
    requestAnimationFrame(() => document.querySelector<HTMLElement>("main h1")?.focus({ preventScroll: true }));
  }
}

/** The same view with other parameters; null removes one. */
export function adjust(changes: Record<string, string | null>, replace = false): void {
  const query = new URLSearchParams(location.search);
  for (const [name, value] of Object.entries(changes)) {
    if (value === null) query.delete(name);
    else query.set(name, value);
  }
  const text = query.toString();
  go(location.pathname + (text && `?${text}`), replace);
}

/** Follows Back, Forward, and every plain click on a link of the page's own. */
export function followLinks(): void {
  addEventListener("popstate", () => (place.value = here()));
  addEventListener("click", (event) => {
    const link = event.target instanceof Element ? event.target.closest("a") : null;
    const modified = event.ctrlKey || event.metaKey || event.shiftKey || event.altKey || event.button !== 0;
    if (!link || modified || event.defaultPrevented || link.target || link.origin !== location.origin) return;
    if (link.pathname.startsWith("/api") || link.hash) return;
    event.preventDefault();
    go(link.pathname + link.search);
  });
}

export const vmAddress = (id: string): string => `/vms/${id}`;
