//! The VMs that were enrolled with a join token, followed until they report.
import { api, ask, Failure, type Schemas } from "../api/client";
import { useEvery, useResource } from "../api/resource";
import { now } from "../clock";
import { ms, SECOND } from "../format";
import { t } from "../i18n";
import { vmAddress } from "../router";
import { Badge } from "../parts/badge";

type JoinToken = Schemas["JoinToken"];

const RELOAD_MS = 2 * SECOND;
/** Size of a page of agents, which is the maximum that the API allows. */
const PAGE = 1000;
/** Maximum number of VMs that are followed and shown. */
const MAX_SHOWN = 10;

interface Enrolled {
  id: string;
  name: string;
  reports: boolean;
}

export function Enrolments({ token, again }: { token: JoinToken; again: () => void }) {
  const texts = t().addVm;
  const found = useResource((signal) => enrolledWith(token.id, signal), [token.id]);
  const { used, vms } = found.data ?? { used: 0, vms: [] };
  const isExpired = now.value >= ms(token.expires_at);
  // auth-svc counts a use shortly before it stores the agent.
  const isComplete = used >= token.uses && vms.length >= Math.min(used, MAX_SHOWN) && vms.every(({ reports }) => reports);
  useEvery(RELOAD_MS, () => isComplete || found.reload());
  return (
    <div class="enrolments" role="status">
      {vms.map(({ id, name, reports }) => (
        <p key={id} data-vm={id}>
          {reports ? <Badge tone="good">{texts.reports}</Badge> : <Badge tone="busy">{texts.enrolled}</Badge>}
          {reports ? <a href={vmAddress(id)}>{name}</a> : <span>{name}</span>}
        </p>
      ))}
      {used > vms.length && <p class="faint">{texts.more(used - vms.length)}</p>}
      {found.failure ? (
        <p class="problem">{texts.cannotFollow}</p>
      ) : isExpired && used < token.uses ? (
        <p><Badge tone="warn">{t().agents.states.expired}</Badge><button type="button" onClick={again}>{texts.again}</button></p>
      ) : used < token.uses && (
        <p><Badge tone="busy">{texts.waiting}</Badge>{token.uses > 1 && <span class="faint">{t().agents.used(used, token.uses)}</span>}</p>
      )}
    </div>
  );
}

/** Finds the VMs that were enrolled with the token. The pages of agents are read only after the token was used. */
async function enrolledWith(token: string, signal: AbortSignal): Promise<{ used: number; vms: Enrolled[] }> {
  const { join_tokens } = await ask(api.GET("/api/v1/join-tokens", { signal }));
  const used = join_tokens.find(({ id }) => id === token)?.used ?? 0;
  const vms: Enrolled[] = [];
  const wanted = Math.min(used, MAX_SHOWN);
  let after: string | undefined;
  while (vms.length < wanted) {
    const query = { limit: PAGE, ...(after !== undefined && { after }) };
    const { agents, next } = await ask(api.GET("/api/v1/agents", { params: { query }, signal }));
    const own = agents.filter(({ join_token_id, revoked_at }) => join_token_id === token && revoked_at === null);
    vms.push(...(await Promise.all(own.slice(0, wanted - vms.length).map((agent) => follow(agent, signal)))));
    if (next === null) break;
    after = next;
  }
  return { used, vms };
}

/** Whether the VM has reported since its agent was enrolled. Until a service knows the VM, the answer is 404. */
async function follow({ instance_id: id, enrolled_at }: Schemas["EnrolledAgent"], signal: AbortSignal): Promise<Enrolled> {
  try {
    const vm = await ask(api.GET("/api/v1/vms/{instance_id}", { params: { path: { instance_id: id } }, signal }));
    const reports = vm.last_report_at !== null && ms(vm.last_report_at) >= ms(enrolled_at);
    return { id, name: vm.name ?? id, reports };
  } catch (error) {
    if (error instanceof Failure && error.status === 404) return { id, name: id, reports: false };
    throw error;
  }
}
