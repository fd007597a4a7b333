//! Dialog that creates a silence: which labels, for how long, and why.
import { useRef, useState } from "preact/hooks";
import { labelsOf } from "../../alerts";
import { api, ask, type Alert } from "../../api/client";
import { HOUR, MINUTE } from "../../format";
import { t } from "../../i18n";
import { FormDialog } from "../../parts/dialog";

/** Maximum number of labels of a silence. */
const MAX_LABELS = 16;
/** Maximum length of the name and the value of a label that the API accepts, in bytes; they have at most as many characters. */
const MAX_TEXT = 1024;
/** Durations to choose from, in hours. */
const LENGTHS = [1, 4, 24, 168] as const;
/** Labels that name an alert: which of them a silence of this alert compares at first. */
const NAMING = ["rule", "instance_id", "subject"];

interface Row {
  id: number;
  name: string;
  value: string;
}

/** The time as the value of an input for date and time, in the time zone of the browser. */
const localText = (at: number): string => new Date(at - new Date(at).getTimezoneOffset() * MINUTE).toISOString().slice(0, 16);

/** A silence of the labels of an alert, or of labels that the user enters. */
export function SilenceDialog({ alert, close }: { alert?: Alert; close: () => void }) {
  const texts = t().alerts.silences;
  const [rows, setRows] = useState<Row[]>(() => rowsOf(alert));
  const [hours, setHours] = useState<number | null>(LENGTHS[0]);
  const began = useRef(Date.now());
  const act = async (form: FormData) => {
    const start = hours === null ? Date.parse(String(form.get("from"))) : Date.now();
    const end = hours === null ? Date.parse(String(form.get("to"))) : start + hours * HOUR;
    if (!(end > start)) throw new Error(texts.order);
    const body = {
      matchers: matchersOf(rows), from: new Date(start).toISOString(), to: new Date(end).toISOString(),
      comment: String(form.get("comment")).trim(),
    };
    await ask(api.POST("/api/v1/alert-silences", { body }));
  };
  return (
    <FormDialog title={texts.addTitle} submit={texts.submit} act={act} close={close} wide>
      <fieldset>
        <legend>{texts.labels}</legend>
        <LabelRows rows={rows} setRows={setRows} suggested={alert ? labelsOf(alert) : {}} />
        <p class="faint small">{texts.labelsHint}</p>
      </fieldset>
      <label>
        {texts.lasting}
        <select value={hours ?? ""} onChange={(event) => setHours(Number(event.currentTarget.value) || null)}>
          {LENGTHS.map((hours) => <option key={hours} value={hours}>{texts.lengths[hours]}</option>)}
          <option value="">{texts.other}</option>
        </select>
      </label>
      {hours === null && (
        <div class="fields">
          <label>{texts.from}<input name="from" type="datetime-local" defaultValue={localText(began.current)} required /></label>
          <label>{texts.to}<input name="to" type="datetime-local" defaultValue={localText(began.current + HOUR)} required /></label>
        </div>
      )}
      <label>{texts.comment}<input name="comment" maxLength={MAX_TEXT} autocomplete="off" /></label>
    </FormDialog>
  );
}

function rowsOf(alert: Alert | undefined): Row[] {
  const labels = alert ? labelsOf(alert) : {};
  const named = NAMING.flatMap((name) => (labels[name] === undefined ? [] : [{ name, value: labels[name] }]));
  return (named.length > 0 ? named : [{ name: "", value: "" }]).map((row, id) => ({ id, ...row }));
}

function matchersOf(rows: Row[]): Record<string, string> {
  const texts = t().alerts.silences;
  const given = rows.map(({ name, value }) => [name.trim(), value] as const).filter(([name]) => name !== "");
  if (given.length === 0) throw new Error(texts.missing);
  const names = given.map(([name]) => name);
  const twice = names.find((name, index) => names.indexOf(name) !== index);
  if (twice !== undefined) throw new Error(texts.twice(twice));
  return Object.fromEntries(given);
}

interface LabelRowsProps {
  rows: Row[];
  setRows: (change: (rows: Row[]) => Row[]) => void;
  /** Labels to choose from: the name of one brings its value. */
  suggested: Record<string, string>;
}

function LabelRows({ rows, setRows, suggested }: LabelRowsProps) {
  const texts = t().alerts.silences;
  const change = (id: number, changes: Partial<Row>) =>
    setRows((all) => all.map((row) => (row.id === id ? { ...row, ...changes } : row)));
  const rename = ({ id, name: before, value }: Row, name: string) => {
    const isUnedited = value === "" || value === suggested[before];
    change(id, { name, ...(isUnedited && { value: suggested[name] ?? "" }) });
  };
  const add = () => setRows((all) => [...all, { id: Math.max(-1, ...all.map(({ id }) => id)) + 1, name: "", value: "" }]);
  return (
    <div class="label-rows">
      <datalist id="alert-labels">{Object.keys(suggested).map((name) => <option key={name} value={name} />)}</datalist>
      {rows.map((row) => (
        <div key={row.id} class="label-row">
          <input
            aria-label={texts.name} placeholder={texts.name} value={row.name} maxLength={MAX_TEXT} list="alert-labels" autocomplete="off"
            autocapitalize="none" spellcheck={false} onInput={(event) => rename(row, event.currentTarget.value)}
          />
          <input
            aria-label={texts.value} placeholder={texts.value} value={row.value} maxLength={MAX_TEXT} autocomplete="off" spellcheck={false}
            onInput={(event) => change(row.id, { value: event.currentTarget.value })}
          />
          <button
            type="button" aria-label={texts.remove(row.name)} title={texts.remove(row.name)}
            onClick={() => setRows((all) => all.filter(({ id }) => id !== row.id))}
          >
            ✕
          </button>
        </div>
      ))}
      <button type="button" disabled={rows.length >= MAX_LABELS} onClick={add}>{texts.addLabel}</button>
    </div>
  );
}
