//! Fields of the form of a rule for its duration, severity, VMs and recipients.
import { SEVERITIES, type Severity } from "../../alerts";
import { api, ask, type Schemas } from "../../api/client";
import { useResource } from "../../api/resource";
import { t, textOf } from "../../i18n";
import type { FieldsProps } from "./condition-fields";
import { SECONDS, type TimeUnit } from "./rule-draft";

/** Longest duration of a rule in seconds: one day. */
const MAX_SECONDS = 86_400;
/** Maximum lengths that the API accepts, in characters. */
const MAX_HYPERVISOR = 128;
const MAX_PATTERN = 128;

export function DurationFields({ draft, change }: FieldsProps) {
  const texts = t().alerts.editor;
  const { severity } = t().alerts;
  return (
    <div class="fields three">
      <label>
        {texts.duration}
        <input
          name="duration" type="number" min={0} max={MAX_SECONDS / SECONDS[draft.unit]} step={1} required value={draft.duration}
          title={texts.durationHint} onInput={(event) => change({ duration: event.currentTarget.value })}
        />
      </label>
      <label>
        {texts.unit}
        <select name="unit" value={draft.unit} onChange={(event) => change({ unit: event.currentTarget.value as TimeUnit })}>
          {(["s", "min", "h"] as const).map((unit) => <option key={unit} value={unit}>{texts.durationUnits[unit]}</option>)}
        </select>
      </label>
      <label>
        {texts.severity}
        <select name="severity" value={draft.severity} onChange={(event) => change({ severity: event.currentTarget.value as Severity })}>
          {SEVERITIES.map((known) => <option key={known} value={known}>{severity[known]}</option>)}
        </select>
      </label>
    </div>
  );
}

export function VmFields({ draft, change }: FieldsProps) {
  const texts = t().alerts.editor;
  const hypervisors = useHypervisors();
  return (
    <fieldset>
      <legend>{texts.vms}</legend>
      <label class="option">
        <input type="radio" name="selects" checked={!draft.selects} onChange={() => change({ selects: false })} />
        {texts.all}
      </label>
      <label class="option">
        <input type="radio" name="selects" checked={draft.selects} onChange={() => change({ selects: true })} />
        {texts.some}
      </label>
      {draft.selects && (
        <div class="fields">
          <label>
            {texts.labels}
            <textarea name="labels" rows={3} placeholder={texts.labelsHint} spellcheck={false} value={draft.labels} onInput={(event) => change({ labels: event.currentTarget.value })} />
          </label>
          <label>
            {texts.ids}
            <textarea name="ids" rows={3} spellcheck={false} value={draft.ids} onInput={(event) => change({ ids: event.currentTarget.value })} />
          </label>
          <label>
            {texts.hypervisor}
            <input
              name="hypervisor" list="alert-hypervisors" maxLength={MAX_HYPERVISOR} autocomplete="off" spellcheck={false}
              value={draft.hypervisor} onInput={(event) => change({ hypervisor: event.currentTarget.value })}
            />
            <datalist id="alert-hypervisors">{hypervisors.map((name) => <option key={name} value={name} />)}</datalist>
          </label>
          <label>
            {texts.pattern}
            <input
              name="pattern" maxLength={MAX_PATTERN} autocomplete="off" spellcheck={false} placeholder={texts.patternHint}
              value={draft.pattern} onInput={(event) => change({ pattern: event.currentTarget.value })}
            />
          </label>
        </div>
      )}
    </fieldset>
  );
}

/** The names of the hypervisors, which a list of VMs contains. */
function useHypervisors(): string[] {
  const query = { limit: 1, sort: "name" as const };
  const read = useResource(async (signal) => (await ask(api.GET("/api/v1/vms", { params: { query }, signal }))).hypervisors, []);
  return (read.data ?? []).map(({ name }) => name);
}

interface RecipientProps extends FieldsProps {
  channels: ReadonlyMap<string, Schemas["ChannelName"]>;
}

export function RecipientFields({ draft, change, channels }: RecipientProps) {
  const texts = t().alerts.editor;
  const { kinds } = t().alerts.channels;
  const toggle = (id: string, on: boolean) =>
    change({ recipients: on ? [...draft.recipients, id] : draft.recipients.filter((one) => one !== id) });
  // A recipient whose channel was removed meanwhile can still be removed from the rule.
  const unknown = channels.size === 0 ? [] : draft.recipients.filter((id) => !channels.has(id));
  const option = (id: string, name: string, note: string) => (
    <label key={id} class="option">
      <input type="checkbox" name="recipient" value={id} checked={draft.recipients.includes(id)} onChange={(event) => toggle(id, event.currentTarget.checked)} />
      <span>{name} <span class="faint">– {note}</span></span>
    </label>
  );
  return (
    <fieldset>
      <legend>{texts.recipients}</legend>
      {[...channels.values()].map(({ id, name, kind, enabled }) =>
        option(id, name, [textOf(kinds, kind), !enabled && texts.channelOff].filter(Boolean).join(", ")))}
      {unknown.map((id) => option(id, id.slice(0, 8), t().common.unknown))}
      {draft.recipients.length === 0 && <p class="faint small">{channels.size === 0 ? texts.noChannels : texts.noneChosen}</p>}
    </fieldset>
  );
}
