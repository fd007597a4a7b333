//! View that lists silences, and creates and ends them.
import { useState } from "preact/hooks";
import { mayManage } from "../../alerts";
import { api, ask, type Schemas } from "../../api/client";
import { useEvery, useResource } from "../../api/resource";
import { now } from "../../clock";
import { fullTime, ms, SECOND, shortTime, visible } from "../../format";
import { t } from "../../i18n";
import { Badge, type Tone } from "../../parts/badge";
import { FormDialog } from "../../parts/dialog";
import { Failed, Loading, Notice } from "../../parts/states";
import { SilenceDialog } from "./silence-dialog";
import { Tabs } from "./tabs";

type Silence = Schemas["Silence"];
type State = "active" | "planned" | "ended";

const RELOAD_MS = 10 * SECOND;
const TONES: Record<State, Tone> = { active: "busy", planned: "quiet", ended: "quiet" };

export function Silences() {
  const texts = t().alerts.silences;
  const [open, setOpen] = useState<Silence | "new" | null>(null);
  const read = useResource(async (signal) => (await ask(api.GET("/api/v1/alert-silences", { signal }))).silences, []);
  useEvery(RELOAD_MS, read.reload);
  const close = () => {
    setOpen(null);
    read.reload();
  };
  return (
    <>
      <div class="heading">
        <h1 tabIndex={-1}>{texts.title}</h1>
        {mayManage() && <button type="button" class="primary" onClick={() => setOpen("new")}>{texts.add}</button>}
      </div>
      <Tabs />
      <p class="lead faint">{texts.hint}{!mayManage() && ` ${texts.mayNot}`}</p>
      {!read.data ? (
        read.failure ? <Failed failure={read.failure} retry={read.reload} /> : <Loading />
      ) : read.data.length === 0 ? (
        <Notice title={texts.emptyTitle}><p>{texts.empty}</p></Notice>
      ) : (
        <SilenceTable silences={read.data} end={setOpen} />
      )}
      {open === "new" && <SilenceDialog close={close} />}
      {open !== null && open !== "new" && <EndDialog silence={open} close={close} />}
    </>
  );
}

function stateOf({ from, to }: Silence): State {
  if (now.value >= ms(to)) return "ended";
  return now.value < ms(from) ? "planned" : "active";
}

const labelTexts = ({ matchers }: Silence): string[] =>
  Object.entries(matchers).map(([name, value]) => `${visible(name)}=${visible(value)}`);

function SilenceTable({ silences, end }: { silences: Silence[]; end: (silence: Silence) => void }) {
  const texts = t().alerts.silences;
  const { columns } = texts;
  return (
    <table class="listed silences">
      <thead>
        <tr>
          <th scope="col">{columns.labels}</th>
          <th scope="col">{columns.state}</th>
          <th scope="col">{columns.from}</th>
          <th scope="col">{columns.to}</th>
          <th scope="col">{columns.by}</th>
          <th scope="col">{columns.comment}</th>
          <th scope="col"><span class="hidden">{columns.action}</span></th>
        </tr>
      </thead>
      <tbody>
        {silences.map((silence) => {
          const state = stateOf(silence);
          const labels = labelTexts(silence);
          return (
            <tr key={silence.id} data-silence={silence.id} class={state === "ended" ? "past" : undefined}>
              <th scope="row"><span class="chips">{labels.map((label) => <span key={label} class="chip">{label}</span>)}</span></th>
              <td class="state"><Badge tone={TONES[state]}>{texts.states[state]}</Badge></td>
              <td data-label={columns.from} title={fullTime(ms(silence.from))}>{shortTime(ms(silence.from))}</td>
              <td data-label={columns.to} title={fullTime(ms(silence.to))}>{shortTime(ms(silence.to))}</td>
              <td data-label={columns.by}>{silence.created_by}</td>
              <td data-label={columns.comment} class="comment">{silence.comment || <span class="faint">{t().common.none}</span>}</td>
              <td class="act">
                {state !== "ended" && mayManage() && (
                  <button type="button" aria-label={texts.endOf(labels.join(", "))} onClick={() => end(silence)}>{texts.end}</button>
                )}
              </td>
            </tr>
          );
        })}
      </tbody>
    </table>
  );
}

function EndDialog({ silence, close }: { silence: Silence; close: () => void }) {
  const texts = t().alerts.silences;
  const act = async () => {
    await ask(api.DELETE("/api/v1/alert-silences/{id}", { params: { path: { id: silence.id } } }));
  };
  return (
    <FormDialog title={texts.endTitle} submit={texts.end} dangerous act={act} close={close}>
      <p class="chips">{labelTexts(silence).map((label) => <span key={label} class="chip">{label}</span>)}</p>
      <p>{texts.endText}</p>
    </FormDialog>
  );
}
