//! Router of the web page. The URL holds the whole state of a view, so that it can be shared and the Back button works.
import { signal } from "@preact/signals";

interface Route {
  path: string;
  query: URLSearchParams;
}

const here = (): Route => ({ path: location.pathname, query: new URLSearchParams(location.search) });

export const route = signal<Route>(here());

/** Navigates within the page; `replace` adds no history entry. */
export function go(address: string, replace = false): void {
  if (address === location.pathname + location.search) return;
  if (replace) history.replaceState(null, "", address);
  else history.pushState(null, "", address);
  const path = route.peek().path;
  route.value = here();
  if (route.peek().path !== path) {
    scrollTo(0, 0);
    // Move the focus to the heading, so that screen readers announce the new view.
    requestAnimationFrame(() => document.querySelector<HTMLElement>("main h1")?.focus({ preventScroll: true }));
  }
}

/** Changes query parameters of the current view; null removes one. */
export function adjust(changes: Record<string, string | null>, replace = false): void {
  const query = new URLSearchParams(location.search);
  for (const [name, value] of Object.entries(changes)) {
    if (value === null) query.delete(name);
    else query.set(name, value);
  }
  const text = query.toString();
  go(location.pathname + (text && `?${text}`), replace);
}

/** Handles Back, Forward and plain clicks on links within the page. */
export function followLinks(): void {
  addEventListener("popstate", () => (route.value = here()));
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
