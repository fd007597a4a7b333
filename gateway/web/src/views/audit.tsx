//! View of the audit log, for administrators.
import { useState } from "preact/hooks";
import { api, ask, type Schemas } from "../api/client";
import { fullTime, ms, visible } from "../format";
import { t, textOf } from "../i18n";
import { Badge, toneOf, type Tone } from "../parts/badge";
import { usePages } from "../parts/pages";
import { Failed, Loading, Notice } from "../parts/states";
import { adjust, route } from "../router";

type Result = Schemas["AuditResult"];

const TONES: Record<Result, Tone> = {
  requested: "busy",
  succeeded: "good",
  refused: "warn",
  failed: "bad",
  timed_out: "bad",
  outcome_unknown: "warn",
};
const FILTERS = ["user", "target", "action"] as const;

export function Audit() {
  const texts = t().audit;
  const asked = Object.fromEntries(
    FILTERS.flatMap((name) => {
      const value = route.value.query.get(name);
      return value ? [[name, value]] : [];
    }),
  );
  const pages = usePages(
    async (before: string | undefined, signal) => {
      const query = { limit: 100, ...asked, ...(before !== undefined && { before }) };
      const { records, next } = await ask(api.GET("/api/v1/audit", { params: { query }, signal }));
      return { items: records, next: next ?? undefined };
    },
    [JSON.stringify(asked)],
  );
  return (
    <>
      <div class="heading">
        <h1 tabIndex={-1}>{texts.title}</h1>
        {!(pages.failure?.status === 403) && <Filters />}
      </div>
      {pages.failure && !pages.loaded ? (
        <Failed failure={pages.failure} retry={pages.reload} />
      ) : !pages.loaded ? (
        <Loading />
      ) : pages.items.length === 0 && pages.next === undefined ? (
        <Notice title={texts.emptyTitle}><p>{texts.empty}</p></Notice>
      ) : (
        <Records records={pages.items} />
      )}
      {pages.next !== undefined && (
        <button type="button" class="more" disabled={pages.loading} onClick={pages.more}>{texts.older}</button>
      )}
    </>
  );
}

function Filters() {
  const texts = t().audit;
  const [values, setValues] = useState(() =>
    Object.fromEntries(FILTERS.map((name) => [name, route.peek().query.get(name) ?? ""])));
  const hints = { user: texts.user, target: texts.target, action: texts.action };
  const send = (event: Event) => {
    event.preventDefault();
    adjust(Object.fromEntries(FILTERS.map((name) => [name, values[name]?.trim() || null])));
  };
  return (
    <form class="filters" role="search" onSubmit={send} onChange={send}>
      {FILTERS.map((name) => (
        <input
          key={name} type="search" aria-label={hints[name]} placeholder={hints[name]} value={values[name]}
          onInput={(event) => setValues({ ...values, [name]: event.currentTarget.value })}
        />
      ))}
    </form>
  );
}

function Records({ records }: { records: Schemas["AuditRecord"][] }) {
  const texts = t().audit;
  const columns = ["at", "user", "action", "target", "result", "source", "detail"] as const;
  return (
    <table class="records">
      <thead>
        <tr>{columns.map((column) => <th key={column} scope="col" class={column}>{texts.columns[column]}</th>)}</tr>
      </thead>
      <tbody>
        {records.map((record) => (
          <tr key={`${record.at} ${record.request_id} ${record.result} ${record.target ?? ""}`}>
            <td class="at"><time dateTime={record.at}>{fullTime(ms(record.at))}</time></td>
            <td class="user">
              {record.user}
              {record.api_token && (
                <span class="by-token small faint" title={record.api_token.id}>{texts.token(visible(record.api_token.name))}</span>
              )}
            </td>
            <td class="action mono">{record.action}</td>
            <td class="target mono">{record.target ?? t().common.none}</td>
            <td class="result"><Badge tone={toneOf(TONES, record.result)}>{textOf(texts.results, record.result)}</Badge></td>
            <td class="source mono">{record.source ?? t().common.none}</td>
            <td class="detail">{record.detail}</td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}
