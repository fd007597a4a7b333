//! Hook for lists that the REST API returns in pages.
import { useEffect, useRef, useState } from "preact/hooks";
import { type Failure } from "../api/client";
import { READ_TIMEOUT_MS, useResource } from "../api/resource";

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

/**
 * Reads the first page when `dependencies` change, and each further page on `more()`. A further page belongs to the first
 * page that it continues: once another first page is requested, it is aborted and never shown.
 */
export function usePages<Item, Cursor>(
  read: (cursor: Cursor | undefined, signal: AbortSignal) => Promise<Page<Item, Cursor>>,
  dependencies: unknown[],
): Pages<Item, Cursor> {
  const key = JSON.stringify(dependencies);
  const turns = useRef(0);
  const first = useResource(
    async (signal) => ({ ...(await read(undefined, signal)), key, turn: ++turns.current }),
    [key],
  );
  const [following, setFollowing] = useState<Page<Item, Cursor> & { turn: number }>({ items: [], next: undefined, turn: 0 });
  const [busy, setBusy] = useState(false);
  const stop = useRef<AbortController | undefined>(undefined);
  const page = first.data;
  useEffect(() => () => stop.current?.abort(), [key, page?.turn]);
  const further = following.turn === page?.turn ? following : undefined;
  const isCurrent = page?.key === key;
  const next = isCurrent ? (further ?? page).next : undefined;
  const more = () => {
    if (busy || first.loading || !page || next === undefined) return;
    const { turn } = page;
    const controller = new AbortController();
    stop.current = controller;
    setBusy(true);
    const done = (more: Page<Item, Cursor>) => {
      if (controller.signal.aborted) return;
      setFollowing((before) => ({
        items: before.turn === turn ? [...before.items, ...more.items] : more.items,
        next: more.next,
        turn,
      }));
    };
    // After a failure the "Load more" button stays visible, so that the user can try again.
    const signal = AbortSignal.any([controller.signal, AbortSignal.timeout(READ_TIMEOUT_MS)]);
    read(next, signal).then(done, () => undefined).finally(() => setBusy(false));
  };
  return {
    items: [...(page?.items ?? []), ...(further?.items ?? [])],
    next,
    // While another first page is read, the old one stays on the screen; if that fails, it must not pass for the new one.
    loaded: page !== undefined && (isCurrent || first.failure === undefined),
    loading: first.loading || busy,
    failure: first.failure,
    turn: page?.turn ?? 0,
    reload: first.reload,
    more,
  };
}
