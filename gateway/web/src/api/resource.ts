//! Hook for data that a view loads from the REST API; also returns whether it is loading or has failed.
import { useEffect, useRef, useState } from "preact/hooks";
import { Failure, failureOf } from "./client";
import { gaps, liveState } from "./live";

/** Time limit of one read; longer than that of the gateway, whose error says more. */
export const READ_TIMEOUT_MS = 30_000;

export interface Resource<T> {
  /** The last data read; kept during a reload and after a failure. */
  data: T | undefined;
  failure: Failure | undefined;
  loading: boolean;
  /** Reads again; while a read is in progress, once it has ended. */
  reload: () => void;
}

/**
 * Reads when `dependencies` change, after a gap in live events, and after a failure once live events are back. Aborts a
 * request only if its answer is no longer wanted, because the dependencies changed or the view was left.
 */
export function useResource<T>(read: (signal: AbortSignal) => Promise<T>, dependencies: unknown[]): Resource<T> {
  const [state, setState] = useState<Omit<Resource<T>, "reload">>({
    data: undefined,
    failure: undefined,
    loading: true,
  });
  const latest = useRef(read);
  latest.current = read;
  const start = useRef<() => void>(() => undefined);
  const reload = useRef(() => start.current()).current;
  const recovered = state.failure !== undefined && liveState.value === "live";
  useEffect(() => {
    const stop = new AbortController();
    let reading = false;
    let again = false;
    start.current = () => {
      again = reading;
      if (reading || stop.signal.aborted) return;
      reading = true;
      setState((before) => ({ ...before, loading: true }));
      const settle = (change: (before: Omit<Resource<T>, "reload">) => Omit<Resource<T>, "reload">) => {
        reading = false;
        if (stop.signal.aborted) return;
        setState(change);
        if (again) start.current();
      };
      latest.current(AbortSignal.any([stop.signal, AbortSignal.timeout(READ_TIMEOUT_MS)])).then(
        (data) => settle(() => ({ data, failure: undefined, loading: false })),
        (error: unknown) => settle((before) => ({ ...before, failure: failureFrom(error), loading: false })),
      );
    };
    start.current();
    return () => stop.abort();
  }, dependencies);
  const gap = useRef(gaps.value);
  useEffect(() => {
    if (gap.current !== gaps.value) reload();
    gap.current = gaps.value;
  }, [gaps.value]);
  useEffect(() => {
    if (recovered) reload();
  }, [recovered]);
  return { ...state, reload };
}

export const failureFrom = (error: unknown): Failure =>
  error instanceof Failure ? error : failureOf(0, { code: "defect", detail: String(error) });

/** Calls back every `ms` milliseconds while the page is visible. */
export function useEvery(ms: number, call: () => void): void {
  const latest = useRef(call);
  latest.current = call;
  useEffect(() => {
    const timer = setInterval(() => document.hidden || latest.current(), ms);
    return () => clearInterval(timer);
  }, [ms]);
}
