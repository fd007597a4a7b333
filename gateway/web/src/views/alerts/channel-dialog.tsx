//! Dialog that creates or changes a channel. The secret can be set and never read.
import { useState } from "preact/hooks";
import { api, ask, Failure, type Schemas } from "../../api/client";
import { t } from "../../i18n";
import { FormDialog } from "../../parts/dialog";

type Channel = Schemas["Channel"];
type Spec = Schemas["ChannelSpec"];
type Target = Schemas["ChannelTarget"];
type Kind = Target["kind"];

const KINDS: Kind[] = ["email", "webhook", "alertmanager"];
const TLS = ["starttls", "tls", "none"] as const;
/** Limits of the API, in characters and seconds. */
const MAX_NAME = 128;
const MAX_URL = 2048;
const MAX_TEMPLATE = 8192;
const MAX_WAIT = 3600;
const [MIN_REPEAT, MAX_REPEAT] = [5, 10_080];
const [MIN_HEARTBEAT, MAX_HEARTBEAT] = [10, 86_400];

export function ChannelDialog({ channel, close }: { channel?: Channel; close: () => void }) {
  const texts = t().alerts.channels;
  const spec = channel?.spec;
  const [kind, setKind] = useState<Kind>(spec?.target.kind ?? "email");
  const act = async (form: FormData) => {
    const secret = String(form.get("secret") ?? "");
    const given = { spec: specOf(form, kind), ...(secret && { secret }) };
    if (!channel) {
      await ask(api.POST("/api/v1/alert-channels", { body: given }));
      return;
    }
    const body = { ...given, revision: channel.revision, forget_secret: form.get("forget") !== null };
    try {
      await ask(api.PUT("/api/v1/alert-channels/{id}", { params: { path: { id: channel.id } }, body }));
    } catch (error) {
      if (error instanceof Failure && error.status === 409) throw new Error(texts.changed);
      throw error;
    }
  };
  return (
    <FormDialog title={spec?.name ?? texts.addTitle} submit={t().common.save} act={act} close={close} wide>
      <label>
        {texts.name}
        <input name="name" defaultValue={spec?.name} maxLength={MAX_NAME} required autocomplete="off" />
      </label>
      <label>
        {texts.kind}
        <select name="kind" value={kind} onChange={(event) => setKind(event.currentTarget.value as Kind)}>
          {KINDS.map((known) => <option key={known} value={known}>{texts.kinds[known]}</option>)}
        </select>
      </label>
      <TargetFields kind={kind} target={spec?.target.kind === kind ? spec.target : undefined} />
      <SecretFields kind={kind} hasSecret={channel?.has_secret ?? false} />
      <label class="option">
        <input name="enabled" type="checkbox" defaultChecked={spec?.enabled ?? true} />
        <span>{texts.enabled} <span class="faint">– {texts.enabledHint}</span></span>
      </label>
      <Options spec={spec} />
    </FormDialog>
  );
}

function TargetFields({ kind, target }: { kind: Kind; target: Target | undefined }) {
  const texts = t().alerts.channels;
  if (kind !== "email") {
    const url = target && "url" in target ? target.url : "";
    return (
      <label key={kind}>
        {texts.url}
        <input name="url" type="url" pattern="https?://.+" defaultValue={url} maxLength={MAX_URL} required autocomplete="off" spellcheck={false} />
        {kind === "alertmanager" && <span class="faint small">{texts.urlAlertmanager}</span>}
      </label>
    );
  }
  const mail = target?.kind === "email" ? target : undefined;
  return (
    <>
      <div class="fields">
        <label>
          {texts.server}
          <input name="server" defaultValue={mail?.server} placeholder="mail.example.com:587" pattern=".+:[0-9]+" required autocomplete="off" spellcheck={false} />
        </label>
        <label>
          {texts.tls}
          <select name="tls">
            {TLS.map((mode) => <option key={mode} value={mode} selected={mode === (mail?.tls ?? "starttls")}>{texts.tlsModes[mode]}</option>)}
          </select>
        </label>
      </div>
      <label>
        {texts.from}
        <input name="from" type="email" defaultValue={mail?.from} placeholder="vmwatch@example.com" required autocomplete="off" />
      </label>
      <label>
        {texts.to}
        <textarea name="to" rows={2} defaultValue={mail?.to.join("\n")} required spellcheck={false} />
      </label>
      <label>
        {texts.user}
        <input name="user" defaultValue={mail?.user ?? ""} maxLength={256} autocomplete="off" autocapitalize="none" spellcheck={false} />
      </label>
    </>
  );
}

function SecretFields({ kind, hasSecret }: { kind: Kind; hasSecret: boolean }) {
  const texts = t().alerts.channels;
  return (
    <>
      <label>
        {texts.secrets[kind]}
        <input name="secret" type="password" autocomplete="new-password" />
        <span class="faint small">{hasSecret ? `${texts.secretKept} ${texts.secretChange}` : texts.secretNone}</span>
      </label>
      {hasSecret && <label class="option"><input name="forget" type="checkbox" />{texts.forget}</label>}
    </>
  );
}

function Options({ spec }: { spec: Spec | undefined }) {
  const texts = t().alerts.channels;
  return (
    <details class="options">
      <summary>{texts.options}</summary>
      <div class="fields">
        <label class="whole">
          {texts.groupBy}
          <input name="group_by" defaultValue={(spec?.group_by ?? ["vm"]).join(", ")} autocomplete="off" spellcheck={false} />
          <span class="faint small">{texts.groupByHint}</span>
        </label>
        <label class="whole">
          {texts.groupWait}
          <input name="group_wait" type="number" min={0} max={MAX_WAIT} defaultValue={String(spec?.group_wait_seconds ?? 0)} required />
        </label>
        <label>
          {texts.repeat}
          <input name="repeat" type="number" min={MIN_REPEAT} max={MAX_REPEAT} defaultValue={spec?.repeat_seconds ? String(spec.repeat_seconds / 60) : ""} step="any" />
          <span class="faint small">{texts.repeatHint}</span>
        </label>
        <label>
          {texts.heartbeat}
          <input name="heartbeat" type="number" min={MIN_HEARTBEAT} max={MAX_HEARTBEAT} defaultValue={spec?.heartbeat_seconds ? String(spec.heartbeat_seconds) : ""} />
          <span class="faint small">{texts.heartbeatHint}</span>
        </label>
        <label class="whole">
          {texts.template}
          <textarea name="template" rows={4} maxLength={MAX_TEMPLATE} defaultValue={spec?.template ?? ""} spellcheck={false} class="mono" />
          <span class="faint small">{texts.templateHint}</span>
        </label>
      </div>
    </details>
  );
}

function specOf(form: FormData, kind: Kind): Spec {
  const text = (name: string) => String(form.get(name) ?? "").trim();
  const [repeat, heartbeat] = [Number(text("repeat")), Number(text("heartbeat"))];
  // The template is sent as it was entered: spaces at its ends may be intended.
  const template = String(form.get("template") ?? "");
  return {
    name: text("name"), enabled: form.get("enabled") !== null, target: targetOf(text, kind),
    group_by: text("group_by").split(",").map((key) => key.trim()).filter(Boolean),
    group_wait_seconds: Number(text("group_wait")),
    ...(repeat > 0 && { repeat_seconds: Math.round(repeat * 60) }),
    ...(heartbeat > 0 && { heartbeat_seconds: heartbeat }),
    ...(template.trim() !== "" && { template }),
  };
}

function targetOf(text: (name: string) => string, kind: Kind): Target {
  if (kind !== "email") return { kind, url: text("url") };
  const user = text("user");
  return {
    kind, server: text("server"), tls: TLS.find((mode) => mode === text("tls")) ?? "starttls", from: text("from"),
    to: text("to").split(/[\s,;]+/).filter(Boolean), ...(user && { user }),
  };
}
