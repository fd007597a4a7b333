//! Labels of a VM: those that operators set, with a dialog to change them, and the read-only ones of its hypervisor.
import { useRef, useState } from "preact/hooks";
import { api, ask, Failure, may, type Schemas } from "../../api/client";
import { useEvery, useResource } from "../../api/resource";
import { t } from "../../i18n";
import { FormDialog } from "../../parts/dialog";

type VmLabels = Schemas["VmLabels"];

const REFRESH_MS = 60_000;
/** Maximum number of labels of a VM. */
const MAX_LABELS = 32;

export function Labels({ id, name }: { id: string; name: string }) {
  const texts = t().labels;
  const [editing, setEditing] = useState(false);
  const path = { instance_id: id };
  const labels = useResource(
    (signal) => ask(api.GET("/api/v1/vms/{instance_id}/labels", { params: { path }, signal })),
    [id],
  );
  useEvery(REFRESH_MS, labels.reload);
  if (!labels.data) return labels.failure ? <p class="faint small">{texts.failed}</p> : null;
  const { labels: own, hypervisor_labels } = labels.data;
  const isEmpty = Object.keys(own).length + Object.keys(hypervisor_labels).length === 0;
  if (isEmpty && !may("operator")) return null;
  return (
    <section class="labels" aria-label={texts.title}>
      {!isEmpty && (
        <ul>
          {sorted(own).map(([key, value]) => <li key={key}><Label label={key} value={value} /></li>)}
          {sorted(hypervisor_labels).map(([key, value]) => (
            <li key={key} class="hypervisor" title={texts.readOnly}><Label label={key} value={value} /></li>
          ))}
        </ul>
      )}
      {may("operator") && <button type="button" onClick={() => setEditing(true)}>{isEmpty ? texts.add : texts.edit}</button>}
      {editing && (
        <EditDialog
          id={id} name={name} labels={labels.data}
          close={() => {
            setEditing(false);
            labels.reload();
          }}
        />
      )}
    </section>
  );
}

const sorted = (labels: Record<string, string>) => Object.entries(labels).sort(([a], [b]) => (a < b ? -1 : 1));

function Label({ label, value }: { label: string; value: string }) {
  return <>{label}{value && <>=<b>{value}</b></>}</>;
}

interface Row {
  id: number;
  key: string;
  value: string;
}

function EditDialog({ id, name, labels, close }: { id: string; name: string; labels: VmLabels; close: () => void }) {
  const texts = t().labels;
  // The change is based on the labels that were shown when the dialog was opened.
  const base = useRef(labels);
  const nextId = useRef(0);
  const row = (key: string, value: string): Row => ({ id: nextId.current++, key, value });
  const [rows, setRows] = useState<Row[]>(() => {
    const shown = sorted(base.current.labels).map(([key, value]) => row(key, value));
    return shown.length > 0 ? shown : [row("", "")];
  });
  const change = (id: number, changes: Partial<Row>) =>
    setRows((all) => all.map((one) => (one.id === id ? { ...one, ...changes } : one)));
  const act = async () => {
    const given = rows.filter(({ key, value }) => key.trim() !== "" || value !== "");
    const keys = given.map(({ key }) => key.trim());
    const twice = keys.find((key, index) => keys.indexOf(key) !== index);
    if (twice !== undefined) throw new Error(texts.twice(twice));
    const body = {
      labels: Object.fromEntries(given.map(({ key, value }) => [key.trim(), value])),
      revision: base.current.revision,
    };
    try {
      await ask(api.PUT("/api/v1/vms/{instance_id}/labels", { params: { path: { instance_id: id } }, body }));
    } catch (error) {
      if (error instanceof Failure && error.status === 409) throw new Error(texts.changed);
      throw error;
    }
  };
  return (
    <FormDialog title={texts.editTitle(name)} submit={t().common.save} act={act} close={close}>
      <div class="label-rows">
        {rows.map(({ id, key, value }) => (
          <div key={id} class="label-row">
            <input
              aria-label={texts.key} placeholder={texts.key} value={key} maxLength={63} autocomplete="off" autocapitalize="none"
              spellcheck={false} onInput={(event) => change(id, { key: event.currentTarget.value })}
            />
            <input
              aria-label={texts.value} placeholder={texts.value} value={value} maxLength={255} autocomplete="off"
              spellcheck={false} onInput={(event) => change(id, { value: event.currentTarget.value })}
            />
            <button
              type="button" aria-label={texts.remove(key)} title={texts.remove(key)}
              onClick={() => setRows((all) => all.filter((one) => one.id !== id))}
            >
              ✕
            </button>
          </div>
        ))}
        <button type="button" disabled={rows.length >= MAX_LABELS} onClick={() => setRows((all) => [...all, row("", "")])}>
          {texts.add}
        </button>
      </div>
      <p class="faint small">{texts.rule}</p>
    </FormDialog>
  );
}
