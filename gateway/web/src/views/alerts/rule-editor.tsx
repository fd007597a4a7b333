//! View of one rule: its form, and the preview of when it would have fired.
import { useRef, useState } from "preact/hooks";
import { mayManage } from "../../alerts";
import { api, ask, Failure, type Schemas } from "../../api/client";
import { useResource } from "../../api/resource";
import { t } from "../../i18n";
import { problemText } from "../../parts/dialog";
import { Failed, Loading, Notice } from "../../parts/states";
import { go } from "../../router";
import { ConditionFields } from "./condition-fields";
import { RulePreview } from "./preview";
import { defaultName, draftOf, specOf, type Draft } from "./rule-draft";
import { DurationFields, RecipientFields, VmFields } from "./rule-fields";
import { changeText, useChannelNames } from "./rules";

type Rule = Schemas["Rule"];

/** Maximum length of a rule's name in bytes; it has at most as many characters. */
const MAX_NAME = 128;

export function NewRule() {
  return mayManage() ? <Editor /> : <MayNot />;
}

export function EditRule({ id }: { id: string }) {
  const texts = t().alerts.rules;
  const rule = useResource((signal) => ask(api.GET("/api/v1/alert-rules/{id}", { params: { path: { id } }, signal })), [id]);
  // The form keeps what the user entered: another read of the rule must not replace it.
  const first = useRef<Rule | undefined>(undefined);
  first.current ??= rule.data;
  if (first.current) return <Editor rule={first.current} />;
  if (rule.failure?.status === 404) {
    return (
      <Notice title={texts.goneTitle} whole>
        <p>{texts.gone}</p>
        <a class="button" href="/alerts/rules">{texts.back}</a>
      </Notice>
    );
  }
  return rule.failure ? <Failed failure={rule.failure} retry={rule.reload} /> : <Loading />;
}

function MayNot() {
  const texts = t().alerts.rules;
  return (
    <Notice title={t().common.forbiddenTitle} kind="forbidden" whole>
      <p>{texts.mayNot}</p>
      <a class="button" href="/alerts/rules">{texts.back}</a>
    </Notice>
  );
}

function Editor({ rule }: { rule?: Rule }) {
  const texts = t().alerts.editor;
  const { rules } = t().alerts;
  const form = useRef<HTMLFormElement>(null);
  const channels = useChannelNames();
  const [draft, setDraft] = useState<Draft>(() => draftOf(rule?.spec));
  const [busy, setBusy] = useState(false);
  const [problem, setProblem] = useState("");
  const change = (changes: Partial<Draft>) => setDraft((before) => ({ ...before, ...changes }));
  const readOnly = !mayManage();
  /** The rule, or undefined if a field is not valid, which the browser then shows. */
  const entered = () => {
    if (!form.current?.reportValidity()) return undefined;
    const isIncomplete = draft.kind === "vm_state" && draft.states.length === 0;
    setProblem(isIncomplete ? texts.statesMissing : "");
    return isIncomplete ? undefined : specOf(draft);
  };
  const save = async (event: SubmitEvent) => {
    event.preventDefault();
    const spec = entered();
    if (!spec) return;
    setBusy(true);
    try {
      await (rule ? update(rule, spec) : ask(api.POST("/api/v1/alert-rules", { body: spec })));
      go("/alerts/rules");
    } catch (error) {
      setProblem(error instanceof Failure && error.status === 409 && rule ? texts.changed : problemText(error));
      setBusy(false);
    }
  };
  return (
    <>
      <div class="heading">
        <a class="back" href="/alerts/rules" aria-label={rules.back} title={rules.back}>←</a>
        <h1 tabIndex={-1}>{rule ? rule.spec.name : texts.newTitle}</h1>
        {rule && <span class="count">{changeText(rule)}</span>}
      </div>
      {rule?.problem && <p class="banner warn" role="status">{rule.problem}</p>}
      <div class="editor">
        <form ref={form} onSubmit={(event) => void save(event)}>
          <fieldset class="plain" disabled={readOnly}>
            <label>
              {texts.name}
              <input
                name="name" value={draft.name} maxLength={MAX_NAME} placeholder={defaultName(draft)} autocomplete="off"
                onInput={(event) => change({ name: event.currentTarget.value })}
              />
            </label>
            <ConditionFields draft={draft} change={change} />
            <DurationFields draft={draft} change={change} />
            <p class="faint small">{texts.durationHint}</p>
            {draft.kind !== "not_receiving" && <VmFields draft={draft} change={change} />}
            <RecipientFields draft={draft} change={change} channels={channels} />
            <label class="option">
              <input name="enabled" type="checkbox" checked={draft.enabled} onChange={(event) => change({ enabled: event.currentTarget.checked })} />
              <span>{texts.enabled} <span class="faint">– {texts.enabledHint}</span></span>
            </label>
          </fieldset>
          {problem && <p class="problem" role="alert">{problem}</p>}
          {readOnly ? <p class="faint">{rules.mayNot}</p> : (
            <>
              {rule && <p class="faint small">{texts.resolves}</p>}
              <div class="buttons">
                <a class="button" href="/alerts/rules">{t().common.cancel}</a>
                <button type="submit" class="primary" disabled={busy}>{rule ? texts.save : texts.create}</button>
              </div>
            </>
          )}
        </form>
        <RulePreview draft={draft} entered={entered} />
      </div>
    </>
  );
}

async function update({ id, revision }: Rule, spec: Schemas["RuleSpec"]): Promise<void> {
  await ask(api.PUT("/api/v1/alert-rules/{id}", { params: { path: { id } }, body: { revision, spec } }));
}
