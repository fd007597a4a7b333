//! View that lists enrolled agents and join tokens and can revoke them, for administrators.
import { useState } from "preact/hooks";
import { api, ask, type Schemas } from "../api/client";
import { useEvery, useResource } from "../api/resource";
import { now } from "../clock";
import { fullTime, ms, SECOND, shortTime } from "../format";
import { t } from "../i18n";
import { Badge, type Tone } from "../parts/badge";
import { FormDialog } from "../parts/dialog";
import { usePages } from "../parts/pages";
import { Failed, Loading, Notice } from "../parts/states";
import { vmAddress } from "../router";
import { AddVm } from "./add-vm";

type Agent = Schemas["EnrolledAgent"];
type JoinToken = Schemas["JoinToken"];
type TokenState = "valid" | "used" | "expired" | "revoked";
type Open = { agent: Agent } | { token: JoinToken };

const RELOAD_MS = 10 * SECOND;
const TONES: Record<TokenState, Tone> = { valid: "good", used: "quiet", expired: "quiet", revoked: "bad" };
/** Maximum number of ids of VMs that a row names. */
const MAX_NAMED = 2;

export function Agents() {
  const texts = t().agents;
  const [open, setOpen] = useState<Open | null>(null);
  const agents = usePages(async (after: string | undefined, signal) => {
    const query = { limit: 100, ...(after !== undefined && { after }) };
    const { agents, next } = await ask(api.GET("/api/v1/agents", { params: { query }, signal }));
    return { items: agents, next: next ?? undefined };
  }, []);
  const tokens = useResource(async (signal) => (await ask(api.GET("/api/v1/join-tokens", { signal }))).join_tokens, []);
  const reload = () => {
    agents.reload();
    tokens.reload();
  };
  useEvery(RELOAD_MS, tokens.reload);
  const close = () => {
    setOpen(null);
    reload();
  };
  const failure = agents.loaded ? undefined : agents.failure;
  return (
    <>
      <div class="heading">
        <h1 tabIndex={-1}>{texts.title}</h1>
        {agents.loaded && <AddVm closed={reload} />}
      </div>
      <p class="lead faint">{texts.hint}</p>
      {!agents.loaded ? (
        failure ? <Failed failure={failure} retry={reload} /> : <Loading />
      ) : agents.items.length === 0 ? (
        <Notice title={texts.emptyTitle}><p>{texts.empty}</p></Notice>
      ) : (
        <AgentTable agents={agents.items} revoke={(agent) => setOpen({ agent })} />
      )}
      {agents.next !== undefined && (
        <button type="button" class="more" disabled={agents.loading} onClick={agents.more}>{t().common.more}</button>
      )}
      {agents.loaded && <TokenSection tokens={tokens.data} revoke={(token) => setOpen({ token })} />}
      {open && <RevokeDialog what={open} close={close} />}
    </>
  );
}

function AgentTable({ agents, revoke }: { agents: Agent[]; revoke: (agent: Agent) => void }) {
  const texts = t().agents;
  const { columns } = texts;
  return (
    <table class="agents">
      <thead>
        <tr>
          <th scope="col">{columns.vm}</th>
          <th scope="col">{columns.state}</th>
          <th scope="col">{columns.enrolled}</th>
          <th scope="col" class="source">{columns.source}</th>
          <th scope="col" class="key">{columns.key}</th>
          <th scope="col"><span class="hidden">{columns.action}</span></th>
        </tr>
      </thead>
      <tbody>
        {agents.map((agent) => (
          <tr key={agent.instance_id} data-agent={agent.instance_id}>
            <th scope="row"><a href={vmAddress(agent.instance_id)}>{agent.instance_id}</a></th>
            <td class="state">
              {agent.revoked_at === null ? (
                <Badge tone="good">{texts.states.enrolled}</Badge>
              ) : (
                <Badge tone="bad" title={fullTime(ms(agent.revoked_at))}>{texts.states.revoked}</Badge>
              )}
            </td>
            <td data-label={columns.enrolled}>{shortTime(ms(agent.enrolled_at))}</td>
            <td data-label={columns.source} class="source">{agent.source ?? t().common.none}</td>
            <td data-label={columns.key} class="key mono" title={agent.public_key}>{agent.public_key.slice(0, 8)}…</td>
            <td class="act">
              {agent.revoked_at === null && (
                <button type="button" aria-label={texts.revokeAgentOf(agent.instance_id)} onClick={() => revoke(agent)}>
                  {texts.revoke}
                </button>
              )}
            </td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

function TokenSection({ tokens, revoke }: { tokens: JoinToken[] | undefined; revoke: (token: JoinToken) => void }) {
  const texts = t().agents;
  return (
    <section class="tokens">
      <h2>{texts.tokens}</h2>
      {tokens === undefined ? (
        <Loading rows={2} />
      ) : tokens.length === 0 ? (
        <p class="faint">{texts.noTokens}</p>
      ) : (
        <TokenTable tokens={tokens} revoke={revoke} />
      )}
    </section>
  );
}

function TokenTable({ tokens, revoke }: { tokens: JoinToken[]; revoke: (token: JoinToken) => void }) {
  const texts = t().agents;
  const { columns } = texts;
  return (
    <table class="tokens">
      <thead>
        <tr>
          <th scope="col">{columns.token}</th>
          <th scope="col">{columns.state}</th>
          <th scope="col">{columns.vms}</th>
          <th scope="col">{columns.used}</th>
          <th scope="col">{columns.expires}</th>
          <th scope="col" class="by">{columns.by}</th>
          <th scope="col"><span class="hidden">{columns.action}</span></th>
        </tr>
      </thead>
      <tbody>
        {tokens.map((token) => {
          const state = stateOf(token);
          return (
            <tr key={token.id} data-token={token.id}>
              <th scope="row" class="mono">{token.id}</th>
              <td class="state"><Badge tone={TONES[state]}>{texts.states[state]}</Badge></td>
              <td data-label={columns.vms}>{vmsText(token.vms)}</td>
              <td data-label={columns.used}>{texts.used(token.used, token.uses)}</td>
              <td data-label={columns.expires} title={fullTime(ms(token.expires_at))}>{shortTime(ms(token.expires_at))}</td>
              <td data-label={columns.by} class="by">{token.created_by}</td>
              <td class="act">
                {state === "valid" && (
                  <button type="button" aria-label={texts.revokeTokenOf(token.id)} onClick={() => revoke(token)}>
                    {texts.revoke}
                  </button>
                )}
              </td>
            </tr>
          );
        })}
      </tbody>
    </table>
  );
}

function stateOf({ revoked, used, uses, expires_at }: JoinToken): TokenState {
  if (revoked) return "revoked";
  if (used >= uses) return "used";
  return now.value >= ms(expires_at) ? "expired" : "valid";
}

/** A newer version of the gateway may send a set of VMs that is none of these. */
function vmsText(vms: JoinToken["vms"]): string {
  const texts = t().agents;
  if (vms === "any") return texts.anyVm;
  if (typeof vms !== "object") return t().common.unknown;
  if ("prefix" in vms) return texts.prefix(vms.prefix);
  if (!("only" in vms)) return t().common.unknown;
  const { only } = vms;
  return only.length <= MAX_NAMED ? only.join(", ") : t().users.someVms(only.length);
}

function RevokeDialog({ what, close }: { what: Open; close: () => void }) {
  const texts = t().agents;
  const act = async () => {
    if ("agent" in what) {
      const path = { instance_id: what.agent.instance_id };
      await ask(api.DELETE("/api/v1/agents/{instance_id}", { params: { path } }));
    } else {
      const path = { join_token_id: what.token.id };
      await ask(api.DELETE("/api/v1/join-tokens/{join_token_id}", { params: { path } }));
    }
  };
  const title = "agent" in what ? texts.revokeAgent(what.agent.instance_id) : texts.revokeToken(what.token.id);
  return (
    <FormDialog title={title} submit={texts.revoke} dangerous act={act} close={close}>
      <p>{"agent" in what ? texts.revokeAgentText : texts.revokeTokenText}</p>
    </FormDialog>
  );
}
