//! What changed between two moments of a VM: the processes that came, went, grew and were restarted.
import { useState } from "preact/hooks";
import { api, ask, type Schemas } from "../../api/client";
import { useResource } from "../../api/resource";
import { fullTime, ms, percent, rate, shortTime, visible, whole } from "../../format";
import { t } from "../../i18n";
import { Badge } from "../../parts/badge";
import { Failed, Loading } from "../../parts/states";
import { Choice } from "../../parts/switches";
import { compare, compared, type Compared, compareNothing, localText } from "./compared";

type Report = Schemas["ProcessChanges"];
type Group = Schemas["ChangedGroup"];
type Usage = Schemas["GroupUsage"];
type Measure = Schemas["TopMeasure"];

const KINDS = ["came", "went", "grew", "restarted"] as const;
const MEASURES: readonly Measure[] = ["cpu", "mem", "disk"];
/** Number of groups that are read for each kind of change. */
const MAX_LISTED = 20;

export function Changes({ id, pinned }: { id: string; pinned: number | null }) {
  const moments = compared();
  return moments && <Comparison id={id} pinned={pinned} moments={moments} />;
}

function Comparison({ id, pinned, moments }: { id: string; pinned: number | null; moments: Compared }) {
  const texts = t().changes;
  const [by, setBy] = useState<Measure>("cpu");
  const { before, after } = moments;
  const isOrdered = before < after;
  const read = useResource(async (signal) => {
    if (!isOrdered) return null;
    const query = { from: new Date(before).toISOString(), to: new Date(after).toISOString(), by, limit: MAX_LISTED };
    return ask(api.GET("/api/v1/vms/{instance_id}/changes", { params: { path: { instance_id: id }, query }, signal }));
  }, [id, before, after, by]);
  const options = MEASURES.map((measure) => [measure, texts.measures[measure]] as const);
  return (
    <section class="changes" aria-label={texts.title} aria-busy={read.loading}>
      <div class="heading">
        <h2 tabIndex={-1}>{texts.title}</h2>
        <button type="button" onClick={compareNothing}>{t().common.close}</button>
      </div>
      <div class="tools">
        <MomentInput label={texts.before} at={before} pinned={pinned} choose={(at) => compare({ before: at, after })} />
        <MomentInput label={texts.after} at={after} pinned={pinned} choose={(at) => compare({ before, after: at })} />
        <Choice label={texts.sortBy} options={options} value={by} choose={setBy} />
      </div>
      {!isOrdered ? (
        <p role="alert">{texts.order}</p>
      ) : read.data ? (
        <ReportOf report={read.data} />
      ) : read.failure ? (
        <Failed failure={read.failure} retry={read.reload} />
      ) : (
        <Loading rows={3} />
      )}
    </section>
  );
}

interface MomentInputProps {
  label: string;
  at: number;
  pinned: number | null;
  choose: (at: number) => void;
}

/** Chooses a moment by its time, or takes the one that is pinned on the charts. */
function MomentInput({ label, at, pinned, choose }: MomentInputProps) {
  const texts = t().changes;
  return (
    <span class="moment-input">
      <label>
        {label}{" "}
        <input
          type="datetime-local" step={1} value={localText(at)}
          onChange={(event) => {
            const chosen = new Date(event.currentTarget.value).getTime();
            if (!Number.isNaN(chosen)) choose(chosen);
          }}
        />
      </label>
      {pinned !== null && pinned !== at && (
        <button type="button" aria-label={texts.usePinnedFor(label)} onClick={() => choose(pinned)}>{texts.usePinned}</button>
      )}
    </span>
  );
}

function ReportOf({ report }: { report: Report }) {
  const texts = t().changes;
  const { before, after } = report;
  if (!before || !after) return <p class="faint">{texts.noTable(before ? texts.after : texts.before)}</p>;
  const isEmpty = KINDS.every((kind) => report[kind].total === 0);
  return (
    <>
      <p class="summary">
        {texts.compared(shortTime(ms(before.at)), whole(before.processes), shortTime(ms(after.at)), whole(after.processes))}{" "}
        {report.rebooted && after.booted_at !== null && (
          <Badge tone="warn">{texts.rebooted(fullTime(ms(after.booted_at)))}</Badge>
        )}
      </p>
      {report.incomplete && <p class="faint">{texts.incomplete}</p>}
      {before.at === after.at && <p class="faint">{texts.sameTable}</p>}
      {isEmpty ? <p class="faint none">{texts.nothing}</p> : (
        <table class="changed">
          <thead>
            <tr>
              <th>{texts.columns.name}</th>
              <th class="owner">{texts.columns.owner}</th>
              <th class="number count">{texts.columns.processes}</th>
              <th class="number">{t().table.columns.cpu}</th>
              <th class="number">{t().table.columns.mem}</th>
              <th class="number disk">{texts.measures.disk}</th>
            </tr>
          </thead>
          {KINDS.map((kind) => report[kind].total > 0 && (
            <tbody key={kind} data-change={kind}>
              <tr class="kind"><th colSpan={6} scope="rowgroup">{texts.kinds[kind](report[kind].total)}</th></tr>
              {report[kind].groups.map((group) => <GroupRow key={keyOf(group)} group={group} isRebooted={report.rebooted === true} />)}
              {report[kind].groups.length < report[kind].total && (
                <tr><td class="faint" colSpan={6}>{texts.more(report[kind].total - report[kind].groups.length)}</td></tr>
              )}
            </tbody>
          ))}
        </table>
      )}
    </>
  );
}

const keyOf = ({ name, user, unit, container }: Group): string => JSON.stringify([name, user, unit, container]);

function GroupRow({ group, isRebooted }: { group: Group; isRebooted: boolean }) {
  const { columns, measures } = t().changes;
  const { name, user, unit, container, before, after, kept } = group;
  const owner = [container ?? unit, user].filter((part): part is string => part !== null).map(visible).join(" · ");
  const values = (value: (usage: Usage) => string) => <Values before={before && value(before)} after={after && value(after)} />;
  const isRestarted = before !== null && after !== null && kept === 0 && !isRebooted && before.started_at !== null;
  return (
    <tr>
      <th scope="row" class="name">
        <span title={visible(name)}>{visible(name)}</span>
        {isRestarted && <>{" "}<Badge tone="quiet">{t().changes.restarted}</Badge></>}
        {owner && <span class="sub">{owner}</span>}
      </th>
      <td class="owner">{owner || t().common.none}</td>
      <td class="number count" data-label={columns.processes}>{values((usage) => whole(usage.processes))}</td>
      <td class="number" data-label={measures.cpu}>{values((usage) => percent(usage.cpu_util))}</td>
      <td class="number" data-label={measures.mem}>{values((usage) => percent(usage.mem))}</td>
      <td class="number disk" data-label={measures.disk}>
        {values((usage) => rate(usage.disk_read + usage.disk_write))}
      </td>
    </tr>
  );
}

/** The value at both moments; that of the only moment at which the group ran; or one value if both are equal. */
function Values({ before, after }: { before: string | null; after: string | null }) {
  if (before === null || after === null || before === after) return <>{after ?? before}</>;
  return <><span class="faint">{before} →</span> {after}</>;
}
