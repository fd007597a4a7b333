//! One alert: what holds, on which VM, for how long, and which processes explain it.
import { useState } from "preact/hooks";
import { acknowledge, isActive, isSilenced, labelsOf, mayManage, momentAddress, spanOf, type AlertState, type Severity } from "../../alerts";
import { may, type Alert, type Schemas } from "../../api/client";
import { now } from "../../clock";
import { duration, fullTime, ms, visible } from "../../format";
import { t, textOf } from "../../i18n";
import { Badge, toneOf, type Tone } from "../../parts/badge";
import { problemText } from "../../parts/dialog";
import { vmAddress } from "../../router";
import { CulpritTable, FirstCulprit } from "./culprits";
import { actionText, conditionText, valueText } from "./texts";

/** The tone of each severity. */
export const SEVERITY: Record<Severity, Tone> = { critical: "bad", warning: "warn", info: "busy" };
const STATE: Record<AlertState, Tone> = { pending: "quiet", firing: "bad", acknowledged: "quiet", resolved: "good" };

export function SeverityBadge({ severity }: { severity: Severity }) {
  return <span class="severity"><Badge tone={toneOf(SEVERITY, severity)}>{textOf(t().alerts.severity, severity)}</Badge></span>;
}

/** Name of the VM, or that of the product if the alert is about none. */
export const vmName = ({ vm_name, instance_id }: Alert): string => vm_name ?? instance_id ?? t().alerts.deployment;

interface CardProps {
  alert: Alert;
  silences?: Schemas["Silence"][];
  /** The card is on the page of its VM, or alone. */
  hidesVm?: boolean;
  open?: boolean;
  /** Called with the alert after a change. */
  changed?: (alert: Alert) => void;
  silence?: (alert: Alert) => void;
}

export function AlertCard({ alert, silences = [], hidesVm = false, open = false, changed, silence }: CardProps) {
  const texts = t().alerts;
  const { rule_name, instance_id, severity, state, subject, condition } = alert;
  const { from, to } = spanOf({ ...alert, fired_at: null }, now.value);
  const value = valueText(condition, alert.value);
  const time = duration(Math.max(0, to - from));
  const isOver = state === "resolved";
  return (
    <li class={`alert ${isOver ? "over" : severity}`} data-alert={alert.id} data-state={state}>
      <div class="head">
        <SeverityBadge severity={severity} />
        <span class="what">
          <strong>{rule_name}</strong>
          {!hidesVm && (instance_id === null ? <span>{vmName(alert)}</span> : <a href={vmAddress(instance_id)} title={instance_id}>{vmName(alert)}</a>)}
          {subject && <span class="mono subject">{visible(subject)}</span>}
        </span>
        {value && <b class="value" title={conditionText(condition)}>{value}</b>}
        <span class="faint lasting" title={fullTime(from)}>{isOver ? texts.lasted(time) : texts.lasting(time)}</span>
        <States alert={alert} silences={silences} />
        <Acts alert={alert} changed={changed} silence={silence} />
      </div>
      <details open={open}>
        <summary><span class="cause"><FirstCulprit alert={alert} /></span></summary>
        <Body alert={alert} />
      </details>
    </li>
  );
}

function States({ alert, silences }: { alert: Alert; silences: Schemas["Silence"][] }) {
  const texts = t().alerts;
  const { state, acknowledged_by, ended_by } = alert;
  return (
    <span class="states">
      {state === "acknowledged" && acknowledged_by !== null ? (
        <Badge tone="quiet">{texts.acknowledgedBy(acknowledged_by)}</Badge>
      ) : state !== "firing" && (
        <Badge tone={toneOf(STATE, state)}>{textOf(texts.state, state)}</Badge>
      )}
      {ended_by && <span class="faint">{texts.endedBy(actionText(ended_by.action), ended_by.user)}</span>}
      {isActive(alert) && isSilenced(labelsOf(alert), silences, now.value) && <Badge tone="quiet">{texts.silenced}</Badge>}
    </span>
  );
}

function Acts({ alert, changed, silence }: Pick<CardProps, "alert"> & { changed: CardProps["changed"]; silence: CardProps["silence"] }) {
  const texts = t().alerts;
  const [busy, setBusy] = useState(false);
  const [problem, setProblem] = useState("");
  const { rule_name, state } = alert;
  const send = async () => {
    setBusy(true);
    setProblem("");
    try {
      changed?.(await acknowledge(alert.id));
    } catch (error) {
      setProblem(problemText(error));
    }
    setBusy(false);
  };
  return (
    <span class="acts">
      {problem && <span class="problem" role="alert" title={problem}>{problem}</span>}
      {changed && state === "firing" && may("operator") && (
        <button type="button" disabled={busy} aria-label={texts.acknowledgeOf(rule_name, vmName(alert))} onClick={() => void send()}>
          {texts.acknowledge}
        </button>
      )}
      {silence && isActive(alert) && mayManage() && (
        <button type="button" aria-label={texts.silenceOf(rule_name, vmName(alert))} onClick={() => silence(alert)}>{texts.silence}</button>
      )}
    </span>
  );
}

/** What the card shows when it is unfolded. */
function Body({ alert }: { alert: Alert }) {
  const texts = t().alerts;
  const { facts } = texts;
  const { id, rule_id, instance_id, condition, subject, since, fired_at, acknowledged_at, acknowledged_by, resolved_at, hypervisor, ended_by } = alert;
  const time = (at: string | null) => at && fullTime(ms(at));
  const shown = [
    [facts.condition, conditionText(condition)],
    [facts.subject, visible(subject)],
    [facts.since, time(since)],
    [facts.fired, time(fired_at)],
    [facts.acknowledged, acknowledged_at && texts.by(fullTime(ms(acknowledged_at)), acknowledged_by ?? "")],
    [facts.resolved, time(resolved_at)],
    [facts.endedBy, ended_by && texts.by(actionText(ended_by.action), ended_by.user)],
    [facts.hypervisor, hypervisor],
  ] as const;
  return (
    <div class="body">
      <CulpritTable alert={alert} />
      <dl class="facts">
        {shown.map(([name, text]) => text && <div key={name}><dt>{name}</dt><dd>{text}</dd></div>)}
      </dl>
      <p class="links">
        {instance_id !== null && <a href={momentAddress({ ...alert, instance_id })}>{texts.moment}</a>}
        <a href={`/alerts/rules/${rule_id}`}>{facts.rule}</a>
        <a href={`/alerts/${id}`} class="mono">{facts.id} {id.slice(0, 8)}</a>
        {may("admin") && <a href={`/alerts/messages?alert=${id}`}>{texts.messages}</a>}
      </p>
    </div>
  );
}
