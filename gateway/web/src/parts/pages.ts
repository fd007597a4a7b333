//! Hook for lists that the REST API returns in pages.
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
  /** Incremented each time the first page is read. */
  turn: number;
  reload: () => void;
  more: () => void;
}

/** Reads the first page when `dependencies` change, and each further page on `more()`. */
export function usePages<Item, Cursor>(
  read: (cursor: Cursor | undefined, signal: AbortSignal) => Promise<Page<Item, Cursor>>,
  dependencies: unknown[],
): Pages<Item, Cursor> {
  const [following, setFollowing] = useState<Page<Item, Cursor>>({ items: [], next: undefined });
  const [turn, setTurn] = useState(0);
  const [busy, setBusy] = useState(false);
  const first = useResource(async (signal) => {
    const page = await read(undefined, signal);
    setFollowing({ items: [], next: page.next });
    setTurn((count) => count + 1);
    return page;
  }, dependencies);
  const more = () => {
    if (busy || following.next === undefined) return;
    setBusy(true);
    const done = (page: Page<Item, Cursor>) =>
      setFollowing((before) => ({ items: [...before.items, ...page.items], next: page.next }));
    // After a failure the "Load more" button stays visible, so that the user can try again.
    read(following.next, new AbortController().signal).then(done, () => undefined).finally(() => setBusy(false));
  };
  return {
    items: [...(first.data?.items ?? []), ...following.items],
    next: following.next,
    loaded: first.data !== undefined,
    loading: first.loading || busy,
    failure: first.failure,
    turn,
    reload: first.reload,
    more,
  };
}
