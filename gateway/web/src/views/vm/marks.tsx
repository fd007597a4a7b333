//! What happened to one VM in the time range: operations, and starts of the VM and of its agent. Alerts have marks of their
//! own.
import { useEffect, useMemo } from "preact/hooks";
import { api, ask, type Schemas } from "../../api/client";
import { onEvent } from "../../api/live";
import { useEvery, useResource } from "../../api/resource";
import { DAY, MINUTE, ms, shortTime, visible, whole } from "../../format";
import { t, textOf } from "../../i18n";
import { OperationBadge } from "../../parts/badge";
import { language } from "../../preferences";
import { compareAround } from "./compared";
import { pin, type Range, RANGES } from "./range";

const REFRESH_MS = MINUTE;
/** Maximum number of marks that are read, and the maximum length of their time range: 400 days. */
const MAX_READ = 500;
const MAX_READ_MS = 400 * DAY;
/** Marks that are listed at first, the newest. */
const MAX_LISTED = 50;

type Mark = Exclude<Schemas["Mark"], { kind: "alert" }>;
type Source = Exclude<Schemas["MarkSource"], "alerts">;
const SOURCES: Source[] = ["operations", "processes"];

/** A moment to mark on all charts. */
export interface Moment {
  at: number;
  kind: Mark["kind"];
  text: string;
}

export interface VmMarks {
  moments: Moment[];
  /** In the order of the list, the newest first. */
  marks: Mark[];
  isCut: boolean;
  /** Sources that could not be read, so that their marks are missing. */
  missing: Source[];
}

export function useVmMarks(id: string, range: Range): VmMarks {
  const time = range.live ? range.name : `${range.from} ${range.to}`;
  const read = useResource((signal) => {
    const to = range.live ? Date.now() : range.to;
    const from = Math.max(range.live ? to - RANGES[range.name] : range.from, to - MAX_READ_MS);
    const query = { from: new Date(from).toISOString(), to: new Date(to).toISOString(), limit: MAX_READ };
    return ask(api.GET("/api/v1/vms/{instance_id}/marks", { params: { path: { instance_id: id }, query }, signal }));
  }, [id, time]);
  useEvery(REFRESH_MS, () => range.live && read.reload());
  useEffect(() => onEvent("operation", ({ instance_id }) => instance_id === id && read.reload()), [id]);
  return useMemo(() => {
    const marks = (read.data?.marks ?? []).filter((mark): mark is Mark => mark.kind !== "alert").reverse();
    return {
      marks,
      moments: marks.map((mark) => ({ at: ms(mark.at), kind: mark.kind, text: textOfMark(mark) })),
      isCut: (read.data?.cut ?? false) || range.to - range.from > MAX_READ_MS,
      missing: SOURCES.filter((source) => read.failure !== undefined || read.data?.missing.includes(source)),
    };
  }, [read.data, read.failure, language.value, time]);
}

function textOfMark(mark: Mark): string {
  const texts = t().marks;
  if (mark.kind !== "operation") return textOf(texts.starts, mark.kind);
  const { confirm, confirmTitle, ...actions } = t().action;
  return texts.operation(textOf(actions, mark.action), visible(mark.user));
}

/** The marks of the time range, below the charts. Each leads to the processes at its moment and to what changed around it. */
export function MarkList({ marks, range }: { marks: VmMarks; range: Range }) {
  return (
    <>
      {marks.missing.map((source) => <p key={source} class="faint small">{t().marks.missing[source]}</p>)}
      {marks.marks.length > 0 && <Listed marks={marks} range={range} />}
    </>
  );
}

function Listed({ marks: { marks, isCut }, range }: { marks: VmMarks; range: Range }) {
  const texts = t().marks;
  const shown = marks.slice(0, MAX_LISTED);
  return (
    <details class="marks small">
      <summary>{texts.title(marks.length)}</summary>
      <ul>
        {shown.map((mark) => {
          const at = ms(mark.at);
          const text = textOfMark(mark);
          return (
            <li key={mark.kind === "operation" ? mark.id : `${mark.kind} ${mark.at}`} data-kind={mark.kind}>
              <button type="button" class="link" title={texts.show} onClick={() => pin(range, at)}>{shortTime(at)}</button>
              <span class="text">{text}</span>
              {mark.kind === "operation" && <OperationBadge state={mark.state} />}
              <button type="button" class="around" aria-label={texts.changesOf(text)} onClick={() => compareAround(at)}>{t().changes.open}</button>
            </li>
          );
        })}
      </ul>
      {(isCut || shown.length < marks.length) && <p class="faint">{texts.cut(whole(shown.length))}</p>}
    </details>
  );
}
