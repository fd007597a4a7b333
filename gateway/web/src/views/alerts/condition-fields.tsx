//! Fields of the form of a rule for its condition.
import { t } from "../../i18n";
import { conditionOf, FAULTS, KINDS, STATES, withKind, type Direction, type Draft, type FaultKind, type Kind, type MachineState } from "./rule-draft";
import { MEASURES, unitOf, type Measure } from "./texts";

/** Maximum lengths that the API accepts, in bytes; a text has at most as many characters. */
const MAX_NAME = 256;
const MAX_MOUNT = 1024;

export interface FieldsProps {
  draft: Draft;
  change: (changes: Partial<Draft>) => void;
}

export function ConditionFields({ draft, change }: FieldsProps) {
  const texts = t().alerts;
  const { editor, condition } = texts;
  const { kind } = draft;
  return (
    <fieldset>
      <legend>{editor.condition}</legend>
      <label>
        {editor.kind}
        <select name="kind" value={kind} onChange={(event) => change(withKind(draft, event.currentTarget.value as Kind))}>
          {KINDS.map((known) => <option key={known} value={known}>{condition.kinds[known]}</option>)}
        </select>
      </label>
      {kind === "measure" && (
        <label>
          {editor.measure}
          <select name="measure" value={draft.measure} onChange={(event) => change({ measure: event.currentTarget.value as Measure })}>
            {MEASURES.map((known) => <option key={known} value={known}>{condition.measures[known]}</option>)}
          </select>
        </label>
      )}
      {kind === "filesystem" && (
        <label>
          {editor.mount}
          <input
            name="mount" value={draft.mount} maxLength={MAX_MOUNT} pattern="[/*].*" title={editor.mountHint} autocomplete="off"
            autocapitalize="none" spellcheck={false} onInput={(event) => change({ mount: event.currentTarget.value })}
          />
          <span class="faint small">{editor.mountHint}</span>
        </label>
      )}
      {(kind === "process_count" || kind === "process_cpu" || kind === "process_mem") && (
        <label>
          {editor.process}
          <input
            name="process" value={draft.process} maxLength={MAX_NAME} required autocomplete="off" autocapitalize="none" spellcheck={false}
            onInput={(event) => change({ process: event.currentTarget.value })}
          />
          <span class="faint small">{editor.processHint}</span>
        </label>
      )}
      {kind === "vm_state" && <StateFields draft={draft} change={change} />}
      {kind === "agent_fault" && (
        <label>
          {editor.fault}
          <select name="fault" value={draft.fault} onChange={(event) => change({ fault: event.currentTarget.value as FaultKind })}>
            {FAULTS.map((known) => <option key={known} value={known}>{condition.faults[known]}</option>)}
          </select>
        </label>
      )}
      {kind === "agent_silent" && <p class="faint small">{editor.silentHint}</p>}
      {kind === "operation_failed" && <p class="faint small">{editor.failedHint}</p>}
      {kind === "not_receiving" && <p class="faint small">{editor.notReceivingHint}</p>}
      <ThresholdFields draft={draft} change={change} />
    </fieldset>
  );
}

function ThresholdFields({ draft, change }: FieldsProps) {
  const { editor, condition } = t().alerts;
  const unit = unitOf(conditionOf(draft));
  if (unit === null) return null;
  const { direction, limit, clear } = draft;
  // `clear` is at the limit or on its other side.
  const bound = limit === "" ? {} : direction === "above" ? { max: limit } : { min: limit };
  return (
    <>
      <div class="fields three">
        <label>
          {editor.direction}
          <select name="direction" value={direction} onChange={(event) => change({ direction: event.currentTarget.value as Direction })}>
            {(["above", "below"] as const).map((known) => <option key={known} value={known}>{condition.direction[known]}</option>)}
          </select>
        </label>
        <label>
          {editor.limit(editor.units[unit])}
          <input
            name="limit" type="number" step="any" required value={limit} onInput={(event) => change({ limit: event.currentTarget.value })}
          />
        </label>
        <label>
          {editor.clear(editor.units[unit])}
          <input
            name="clear" type="number" step="any" value={clear} placeholder={limit} {...bound}
            onInput={(event) => change({ clear: event.currentTarget.value })}
          />
        </label>
      </div>
      <p class="faint small">{editor.clearHint}</p>
    </>
  );
}

function StateFields({ draft, change }: FieldsProps) {
  const texts = t().alerts.editor;
  const toggle = (state: MachineState, on: boolean) =>
    change({ states: on ? [...draft.states, state] : draft.states.filter((one) => one !== state) });
  return (
    <div class="options-grid" role="group" aria-label={texts.states}>
      {STATES.map((state) => (
        <label key={state} class="option">
          <input type="checkbox" name="state" checked={draft.states.includes(state)} onChange={(event) => toggle(state, event.currentTarget.checked)} />
          {t().state[state]}
        </label>
      ))}
    </div>
  );
}
