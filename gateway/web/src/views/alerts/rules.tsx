//! View that lists alert rules.
import { useState } from "preact/hooks";
import { mayManage } from "../../alerts";
import { api, ask, type Schemas } from "../../api/client";
import { useEvery, useResource } from "../../api/resource";
import { fullTime, ms, SECOND, whole } from "../../format";
import { t } from "../../i18n";
import { Badge } from "../../parts/badge";
import { FormDialog } from "../../parts/dialog";
import { Failed, Loading, Notice } from "../../parts/states";
import { SeverityBadge } from "./card";
import { Tabs } from "./tabs";
import { lastingText } from "./texts";

type Rule = Schemas["Rule"];
type Unreadable = Schemas["UnreadableRule"];
/** What of a rule its removal needs. */
type Named = Pick<Unreadable, "id" | "revision" | "name">;

const RELOAD_MS = 15 * SECOND;

export function Rules() {
  const texts = t().alerts.rules;
  const [removing, setRemoving] = useState<Named | null>(null);
  const list = useResource((signal) => ask(api.GET("/api/v1/alert-rules", { signal })), []);
  const channels = useChannelNames();
  useEvery(RELOAD_MS, list.reload);
  const close = () => {
    setRemoving(null);
    list.reload();
  };
  return (
    <>
      <div class="heading">
        <h1 tabIndex={-1}>{texts.title}</h1>
        {mayManage() && <a class="button primary" href="/alerts/rules/new">{texts.add}</a>}
      </div>
      <Tabs />
      {!mayManage() && <p class="lead faint">{texts.mayNot}</p>}
      {!list.data ? (
        list.failure ? <Failed failure={list.failure} retry={list.reload} /> : <Loading />
      ) : list.data.rules.length + list.data.unreadable.length === 0 ? (
        <Notice title={texts.emptyTitle}><p>{texts.empty}</p></Notice>
      ) : (
        <RuleTable {...list.data} channels={channels} remove={setRemoving} />
      )}
      {removing && <RemoveDialog rule={removing} close={close} />}
    </>
  );
}

/** The names of all channels by id; empty until they have been read. */
export function useChannelNames(): ReadonlyMap<string, Schemas["ChannelName"]> {
  const names = useResource(async (signal) => {
    const { channels } = await ask(api.GET("/api/v1/alert-channels/names", { signal }));
    return new Map(channels.map((channel) => [channel.id, channel]));
  }, []);
  return names.data ?? new Map();
}

interface TableProps {
  rules: Rule[];
  unreadable: Unreadable[];
  channels: ReadonlyMap<string, Schemas["ChannelName"]>;
  remove: (rule: Named) => void;
}

function RuleTable({ rules, unreadable, channels, remove }: TableProps) {
  const texts = t().alerts.rules;
  const { columns } = texts;
  return (
    <table class="listed rules">
      <thead>
        <tr>
          <th scope="col">{columns.name}</th>
          <th scope="col">{columns.condition}</th>
          <th scope="col">{columns.vms}</th>
          <th scope="col">{columns.recipients}</th>
          <th scope="col" class="number">{columns.active}</th>
          <th scope="col"><span class="hidden">{columns.action}</span></th>
        </tr>
      </thead>
      <tbody>
        {rules.map((rule) => <RuleRow key={rule.id} rule={rule} channels={channels} remove={remove} />)}
        {unreadable.map((rule) => <UnreadableRow key={rule.id} rule={rule} remove={remove} />)}
      </tbody>
    </table>
  );
}

function RuleRow({ rule, channels, remove }: Pick<TableProps, "channels" | "remove"> & { rule: Rule }) {
  const texts = t().alerts.rules;
  const { columns } = texts;
  const { id, revision, problem, active } = rule;
  const { name, severity, enabled, condition, for_seconds } = rule.spec;
  return (
    <tr data-rule={id} class={enabled ? undefined : "past"}>
      <th scope="row">
        <span class="titled">
          <SeverityBadge severity={severity} />
          <a href={`/alerts/rules/${id}`} title={changeText(rule)}>{name}</a>
          {!enabled && <Badge tone="quiet">{texts.off}</Badge>}
        </span>
        {problem !== null && <span class="problem small">{problem}</span>}
      </th>
      <td data-label={columns.condition}>{lastingText(condition, for_seconds)}</td>
      <td data-label={columns.vms}>{vmsText(rule.spec)}</td>
      <td data-label={columns.recipients}><Recipients rule={rule} channels={channels} /></td>
      <td data-label={columns.active} class="number">{active > 0 ? <b>{whole(active)}</b> : <span class="faint">0</span>}</td>
      <td class="act">
        {mayManage() && (
          <>
            <a class="button" href={`/alerts/rules/${id}`} aria-label={texts.editOf(name)}>{texts.edit}</a>
            <RemoveButton rule={{ id, revision, name }} remove={remove} />
          </>
        )}
      </td>
    </tr>
  );
}

/** A rule that only another version of vmwatch can read. */
function UnreadableRow({ rule, remove }: Pick<TableProps, "remove"> & { rule: Unreadable }) {
  return (
    <tr data-rule={rule.id}>
      <th scope="row" colSpan={5}>
        {nameOf(rule)}
        <span class="problem small">{rule.problem}</span>
      </th>
      <td class="act">{mayManage() && <RemoveButton rule={rule} remove={remove} />}</td>
    </tr>
  );
}

const nameOf = ({ id, name }: Named): string => name ?? id.slice(0, 8);

function RemoveButton({ rule, remove }: Pick<TableProps, "remove"> & { rule: Named }) {
  const texts = t().alerts.rules;
  return <button type="button" aria-label={texts.removeOf(nameOf(rule))} onClick={() => remove(rule)}>{texts.remove}</button>;
}

export function changeText({ changed_by, changed_at }: Rule): string {
  const texts = t().alerts.rules;
  return changed_by === "" ? texts.starter : texts.changed(changed_by, fullTime(ms(changed_at)));
}

function Recipients({ rule, channels }: Pick<TableProps, "channels"> & { rule: Rule }) {
  const { recipients = [] } = rule.spec;
  if (recipients.length === 0) return <span class="faint">{t().alerts.rules.nobody}</span>;
  const names = recipients.map((id) => channels.get(id)?.name ?? t().common.unknown);
  return <>{names.join(", ")}</>;
}

/** The VMs that a rule applies to. */
export function vmsText({ vms, condition }: Schemas["RuleSpec"]): string {
  const texts = t().alerts.rules;
  if (condition.kind === "not_receiving") return t().common.none;
  const { ids = [], labels = [], hypervisor, name } = vms ?? {};
  const parts = [
    ids.length > 0 && texts.ids(ids.length),
    labels.length > 0 && texts.labelled(labels.join(", ")),
    hypervisor && texts.onHypervisor(hypervisor),
    name && texts.named(name),
  ];
  return parts.filter(Boolean).join(" · ") || texts.allVms;
}

function RemoveDialog({ rule, close }: { rule: Named; close: () => void }) {
  const texts = t().alerts.rules;
  const act = async () => {
    const params = { path: { id: rule.id }, query: { revision: rule.revision } };
    await ask(api.DELETE("/api/v1/alert-rules/{id}", { params }));
  };
  return (
    <FormDialog title={texts.removeTitle(nameOf(rule))} submit={texts.remove} dangerous act={act} close={close}>
      <p>{texts.removeText}</p>
    </FormDialog>
  );
}
