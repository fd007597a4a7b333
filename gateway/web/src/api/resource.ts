//! Hook for data that a view loads from the REST API; also returns whether it is loading or has failed.
import { useEffect, useRef, useState } from "preact/hooks";
import { Failure, failureOf } from "./client";
import { gaps, liveState } from "./live";

export interface Resource<T> {
  /** The last data read; kept during a reload and after a failure. */
  data: T | undefined;
  failure: Failure | undefined;
  loading: boolean;
  reload: () => void;
}

/** Reads when `dependencies` change, after a gap in live events, and after a failure once live events are back. */
export function useResource<T>(read: (signal: AbortSignal) => Promise<T>, dependencies: unknown[]): Resource<T> {
  const [state, setState] = useState<Omit<Resource<T>, "reload">>({
    data: undefined,
    failure: undefined,
    loading: true,
  });
  const [again, setAgain] = useState(0);
  const reload = useRef(() => setAgain((count) => count + 1)).current;
  const recovered = state.failure !== undefined && liveState.value === "live";
  useEffect(() => {
    const stop = new AbortController();
    setState((before) => ({ ...before, loading: true }));
    read(stop.signal).then(
      (data) => !stop.signal.aborted && setState({ data, failure: undefined, loading: false }),
      (error: unknown) => {
        if (stop.signal.aborted) return;
        const failure = error instanceof Failure ? error : failureOf(0, { code: "defect", detail: String(error) });
        setState((before) => ({ ...before, failure, loading: false }));
      },
    );
    return () => stop.abort();
  }, [...dependencies, again, gaps.value]);
  useEffect(() => {
    if (recovered) reload();
  }, [recovered]);
  return { ...state, reload };
}

/** Calls back every `ms` milliseconds while the page is visible. */
export function useEvery(ms: number, call: () => void): void {
  const latest = useRef(call);
  latest.current = call;
  useEffect(() => {
    const timer = setInterval(() => document.hidden || latest.current(), ms);
    return () => clearInterval(timer);
  }, [ms]);
}
