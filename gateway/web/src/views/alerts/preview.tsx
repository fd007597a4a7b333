//! When a rule would have fired in the last seven days, computed by the server from the history of VMs.
import { useEffect, useRef, useState } from "preact/hooks";
import { api, ask, type Schemas } from "../../api/client";
import { failureFrom } from "../../api/resource";
import { fullTime, MINUTE, ms } from "../../format";
import { t } from "../../i18n";
import { problemText } from "../../parts/dialog";
import { Loading } from "../../parts/states";
import { vmAddress } from "../../router";
import { specOf, type Draft } from "./rule-draft";
import { type Condition, valueText, wholeDuration } from "./texts";

type Preview = Schemas["Preview"];
type PreviewVm = Preview["vms"][number];

/** A preview reads the history of up to 50 VMs. */
const TIMEOUT_MS = 60_000;
/** Maximum number of VMs, and of times of each, that are listed. */
const MAX_VMS = 20;
const MAX_TIMES = 3;
/** Length of the shortest time buckets that are evaluated. */
const SHORTEST_STEP_MS = 5 * MINUTE;
/** Width of the drawing of seven days, in units of its view box. */
const WIDTH = 1000;

interface Shown {
  preview: Preview;
  condition: Condition;
  /** The form when the preview was requested. */
  key: string;
}

interface RulePreviewProps {
  draft: Draft;
  /** The rule, or undefined if a field is not valid. */
  entered: () => Schemas["RuleSpec"] | undefined;
}

export function RulePreview({ draft, entered }: RulePreviewProps) {
  const texts = t().alerts.preview;
  const [shown, setShown] = useState<Shown | undefined>(undefined);
  const [busy, setBusy] = useState(false);
  const [problem, setProblem] = useState("");
  const stop = useRef<AbortController | undefined>(undefined);
  useEffect(() => () => stop.current?.abort(), []);
  const run = async () => {
    const body = entered();
    if (!body) return;
    stop.current?.abort();
    const controller = new AbortController();
    stop.current = controller;
    setBusy(true);
    setProblem("");
    const signal = AbortSignal.any([controller.signal, AbortSignal.timeout(TIMEOUT_MS)]);
    try {
      const preview = await ask(api.POST("/api/v1/alert-rules/preview", { body, signal }));
      if (controller.signal.aborted) return;
      setShown({ preview, condition: body.condition, key: keyOf(draft) });
    } catch (error) {
      if (controller.signal.aborted) return;
      setProblem(problemText(failureFrom(error)));
    }
    setBusy(false);
  };
  return (
    <section class="preview" aria-label={texts.title} aria-busy={busy}>
      <div class="heading">
        <h2>{texts.title}</h2>
        <button type="button" disabled={busy} onClick={() => void run()}>{texts.run}</button>
      </div>
      {problem && <p class="problem" role="alert">{problem}</p>}
      {busy && !shown ? <Loading rows={3} /> : shown ? (
        <>
          {shown.key !== keyOf(draft) && <p class="faint small" role="status">{texts.outdated}</p>}
          <Result {...shown} />
        </>
      ) : <p class="faint">{texts.hint}</p>}
    </section>
  );
}

/** What of the form the preview depends on. */
function keyOf(draft: Draft): string {
  const { condition, for_seconds, vms } = specOf(draft);
  return JSON.stringify({ condition, for_seconds, vms });
}

function Result({ preview, condition }: Shown) {
  const texts = t().alerts.preview;
  const { vms, evaluated, selected, step_ms, unread } = preview;
  const { kind } = condition;
  if (kind in texts.impossible) {
    return (
      <>
        <p role="status">{texts.impossible[kind as keyof typeof texts.impossible]}</p>
        {kind !== "not_receiving" && <p class="faint small limits">{selected === 0 ? texts.noVms : texts.selected(selected)}</p>}
      </>
    );
  }
  const times = vms.reduce((sum, vm) => sum + vm.firing.length, 0);
  const shown = vms.slice(0, MAX_VMS);
  return (
    <>
      <p role="status"><b>{selected === 0 ? texts.noVms : times === 0 ? texts.never : texts.times(times, vms.length)}</b></p>
      {shown.length > 0 && (
        <ul class="previewed">
          {shown.map((vm) => <PreviewedVm key={vm.instance_id} vm={vm} preview={preview} condition={condition} />)}
        </ul>
      )}
      {vms.length > shown.length && <p class="faint">{texts.moreVms(vms.length - shown.length)}</p>}
      <ul class="limits faint small">
        {selected > 0 && <li>{texts.evaluated(evaluated, selected)}</li>}
        {(kind === "measure" || kind === "agent_silent") && <li>{texts.limits[kind](wholeDuration(Math.max(SHORTEST_STEP_MS, step_ms)))}</li>}
        {Object.entries(unread).map(([reason, count]) => <li key={reason}>{texts.unread(count, reason)}</li>)}
      </ul>
    </>
  );
}

function PreviewedVm({ vm, preview, condition }: { vm: PreviewVm; preview: Preview; condition: Condition }) {
  const texts = t().alerts.preview;
  // The newest times are listed, which are the last ones.
  const listed = vm.firing.slice(-MAX_TIMES).reverse();
  return (
    <li data-vm={vm.instance_id}>
      <a href={vmAddress(vm.instance_id)}>{vm.vm_name ?? vm.instance_id}</a>
      <Strip vm={vm} preview={preview} />
      <ul class="faint small">
        {listed.map(({ from, to, peak }) => {
          const value = valueText(condition, peak);
          const text = texts.firing(fullTime(ms(from)), wholeDuration(ms(to) - ms(from)));
          return <li key={from}>{value ? `${text}, ${texts.peak(value)}` : text}</li>;
        })}
        {vm.firing.length > listed.length && <li>{texts.more(vm.firing.length - listed.length)}</li>}
      </ul>
    </li>
  );
}

/** The seven days as a bar, in which the times of the alert are coloured. */
function Strip({ vm, preview }: { vm: PreviewVm; preview: Preview }) {
  const [from, to] = [ms(preview.from), ms(preview.to)];
  const x = (at: number) => (WIDTH * (at - from)) / Math.max(1, to - from);
  return (
    <svg
      class="strip" viewBox={`0 0 ${WIDTH} 10`} preserveAspectRatio="none" role="img"
      aria-label={t().alerts.preview.strip(vm.firing.length)}
    >
      <rect width={WIDTH} height="10" class="ground" />
      {vm.firing.map((time) => (
        // A short time is still visible.
        <rect key={time.from} x={x(ms(time.from))} width={Math.max(3, x(ms(time.to)) - x(ms(time.from)))} height="10" class="fires" />
      ))}
    </svg>
  );
}
