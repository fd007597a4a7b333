//! A list that the API gives in pages.
import { useState } from "preact/hooks";
import { type Failure } from "../api/client";
import { useResource } from "../api/resource";

interface Page<Item, Cursor> {
  items: Item[];
  next: Cursor | undefined;
}

interface Pages<Item, Cursor> extends Page<Item, Cursor> {
  loaded: boolean;
  loading: boolean;
  failure: Failure | undefined;
  /** Grows whenever the list is read from its beginning. */
  turn: number;
  reload: () => void;
  more: () => void;
}

/** Reads the first page when `dependencies` change, and the others as they are asked for. */
export function usePages<Item, Cursor>(
  read: (cursor: Cursor | undefined, signal: AbortSignal) => Promise<Page<Item, Cursor>>,
  dependencies: unknown[],
): Pages<Item, Cursor> {
  const [behind, setBehind] = useState<Page<Item, Cursor>>({ items: [], next: undefined });
  const [turn, setTurn] = useState(0);
  const [busy, setBusy] = useState(false);
  const first = useResource(async (signal) => {
    const page = await read(undefined, signal);
    setBehind({ items: [], next: page.next });
    setTurn((count) => count + 1);
    return page;
  }, dependencies);
  const more = () => {
    if (busy || behind.next === undefined) return;
    setBusy(true);
    const done = (page: Page<Item, Cursor>) =>
      setBehind((before) => ({ items: [...before.items, ...page.items], next: page.next }));
    // A page that fails leaves the button where it is.
    read(behind.next, new AbortController().signal).then(done, () => undefined).finally(() => setBusy(false));
  };
  return {
    items: [...(first.data?.items ?? []), ...behind.items],
    next: behind.next,
    loaded: first.data !== undefined,
    loading: first.loading || busy,
    failure: first.failure,
    turn,
    reload: first.reload,
    more,
  };
}
