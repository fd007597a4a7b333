//! Placeholders that a view shows when its data is empty, failed, loading or incomplete.
import type { ComponentChildren } from "preact";
import type { Failure, Schemas } from "../api/client";
import { t } from "../i18n";

interface NoticeProps {
  title: string;
  children?: ComponentChildren;
  kind?: "empty" | "failed" | "forbidden";
  /** The notice fills the whole view, so its title is the page heading. */
  whole?: boolean;
}

export function Notice({ title, children, kind = "empty", whole = false }: NoticeProps) {
  return (
    <div class={`notice ${kind}`} role={kind === "failed" ? "alert" : undefined}>
      <NoticeMark kind={kind} />
      {whole ? <h1 tabIndex={-1}>{title}</h1> : <h2>{title}</h2>}
      {children}
    </div>
  );
}

function NoticeMark({ kind }: { kind: NonNullable<NoticeProps["kind"]> }) {
  const paths = {
    empty: "M4 17h5l3-9 5 14 3-8 2 3h6",
    failed: "M16 9v9m0 4.5v.5M16 3 2.5 27h27z",
    forbidden: "M9 14v-4a7 7 0 0 1 14 0v4M6 14h20v14H6z",
  };
  return (
    <svg class="mark" viewBox="0 0 32 32" width="32" height="32" aria-hidden="true">
      <path d={paths[kind]} fill="none" stroke="currentColor" stroke-width="2" stroke-linejoin="round" />
    </svg>
  );
}

/** An error with its cause and a button to try again. */
export function Failed({ failure, retry }: { failure: Failure; retry: () => void }) {
  const texts = t().common;
  if (failure.status === 403) {
    return (
      <Notice title={texts.forbiddenTitle} kind="forbidden">
        <p>{texts.forbidden}</p>
      </Notice>
    );
  }
  return (
    <Notice title={failure.status === 0 ? texts.unreachable : texts.failed} kind="failed">
      {failure.message && <p>{failure.message}</p>}
      {failure.requestId && <p class="faint">{texts.request(failure.requestId)}</p>}
      <button type="button" onClick={retry}>{texts.retry}</button>
    </Notice>
  );
}

/** The address of the page has no view. */
export function NotFound() {
  const texts = t().common;
  return (
    <Notice title={texts.notFoundTitle} whole>
      <p>{texts.notFound}</p>
      <a class="button" href="/">{texts.home}</a>
    </Notice>
  );
}

/** Skeleton rows shown while loading, labelled for screen readers. */
export function Loading({ rows = 6 }: { rows?: number }) {
  return (
    <div class="loading" role="status" aria-label={t().common.loading}>
      {Array.from({ length: rows }, (_, index) => <div key={index} class="bone" />)}
    </div>
  );
}

/** Banner for incomplete VM data, when metrics or hypervisors are unreachable. */
export function DegradedNote({ degraded }: { degraded: Schemas["Degraded"][] }) {
  if (degraded.length === 0) return null;
  return (
    <div class="banner warn" role="status">
      {degraded.map(({ part, detail }) => (
        <span key={detail}>{t().common.labelled(t().common.degraded[part], detail)}</span>
      ))}
    </div>
  );
}
