import { useState } from "preact/hooks";
import type { Vm } from "../api/client";
import { now } from "../clock";
import { ago, ms, rate, sum } from "../format";
import { t } from "../i18n";
import { act, latest } from "../operations";
import { Badge, isOver, MachineBadge, OperationBadge } from "../parts/badge";
import { problemText } from "../parts/dialog";
import { Meter } from "../parts/meter";
import { Sparkline } from "../parts/sparkline";
import { vmAddress } from "../router";
import { FaultBadge, isUnstored } from "./agent-faults";
import { FiringBadge } from "./alerts/vm-badge";
import { isMeasured } from "./rows";
import { copyTexts, startProblem } from "./vm/actions";

export function VmRow({ vm, index, acts }: { vm: Vm; index: number; acts: boolean }) {
  const texts = t();
  const name = vm.name ?? vm.instance_id;
  const measured = isMeasured(vm);
  const sample = measured ? vm.hypervisor_sample : vm.sample;
  const stale = !measured && (vm.agent === "silent" || isUnstored(vm.agent_faults));
  const [cpu, mem] = [sample?.cpu_util ?? null, sample?.mem ?? null];
  const net = sample && sum(sample.net_incoming, sample.net_outgoing);
  const disk = sample && sum(sample.disk_read, sample.disk_write);
  const none = <span class="faint">{texts.common.none}</span>;
  return (
    <tr aria-rowindex={index} class={stale ? "silent" : undefined} data-vm={vm.instance_id}>
      <th scope="row" class="name">
        <div class="named">
          <a href={vmAddress(vm.instance_id)} title={details(vm)}>{name}</a>
          <FiringBadge id={vm.instance_id} />
        </div>
        <span class="sub">{vm.name === null ? vm.hypervisor : vm.instance_id}</span>
      </th>
      <td class="state">
        <MachineBadge state={vm.state} />
        {vm.copies.length > 0 && <Badge tone="warn" title={copyTexts(vm.copies).join("\n")}>{texts.vms.conflict}</Badge>}
      </td>
      <td class="number cpu">{cpu === null ? none : <Meter value={cpu} />}</td>
      <td class="hour"><Sparkline values={vm.cpu_sparkline} /></td>
      <td class="number mem">{mem === null ? none : <Meter value={mem} hot={90} />}</td>
      <td class="number net">{net === null ? none : rate(net)}</td>
      <td class="number disk">{disk === null ? none : rate(disk)}</td>
      <td class="report">
        <Report vm={vm} />
        {measured && <span class="sub" title={texts.vms.measuredTitle}>{texts.vms.measured}</span>}
      </td>
      {acts && <td class="act"><StartButton vm={vm} name={name} /></td>}
    </tr>
  );
}

/** Name, id, hypervisors, labels and the version of the agent, one per line. */
function details({ name, instance_id, hypervisor, copies, labels, agent_version, agent_outdated }: Vm): string {
  const agent = agent_version === null ? null : t().vms.agentVersion(agent_version, agent_outdated);
  const on = copies.length > 0 ? copyTexts(copies) : [hypervisor];
  const lines = [name, instance_id, ...on, ...Object.entries(labels).map((label) => label.join("=")), agent];
  return [...new Set(lines)].filter(Boolean).join("\n");
}

/** When the VM last reported, and what is wrong with its agent. */
function Report({ vm: { agent, last_report_at: at, agent_faults: faults, agent_version: version, agent_outdated } }: { vm: Vm }) {
  const last = at && ago(ms(at), now.value);
  const reports = agent === "silent" ? (
    <Badge tone="warn" title={last ?? ""}>{t().agent.silent}</Badge>
  ) : (
    <span class="faint">{agent === "reporting" && last ? last : t().agent[agent ?? "none"]}</span>
  );
  const more = faults.length > 0 ? (
    <FaultBadge faults={faults} />
  ) : agent === "silent" && last ? (
    <span class="sub">{last}</span>
  ) : (
    version !== null && agent_outdated && <span class="sub">{t().vms.agentVersion(version, true)}</span>
  );
  return (
    <div class="reports">
      <div>{reports}</div>
      {more && <div>{more}</div>}
    </div>
  );
}

/** States that show by themselves why the VM cannot be started. */
const EVIDENT: ReadonlySet<string> = new Set(["running", "starting", "shutting_down", "none"]);

/** Starts a stopped VM and shows the progress of the operation. */
function StartButton({ vm, name }: { vm: Vm; name: string }) {
  const id = vm.instance_id;
  const [problem, setProblem] = useState("");
  const [submitting, setSubmitting] = useState(false);
  const operation = latest.value.get(id);
  if (operation && !isOver(operation.state)) return <OperationBadge state={operation.state} />;
  const start = async () => {
    setSubmitting(true);
    setProblem("");
    try {
      await act(id, "start");
    } catch (error) {
      setProblem(problemText(error));
    }
    setSubmitting(false);
  };
  const error = problem || operation?.failure?.detail;
  const startable = vm.allowed_actions.includes("start");
  const why = EVIDENT.has(vm.state ?? "none") || vm.copies.length > 0 ? undefined : startProblem(vm);
  return (
    <>
      {error && <span class="problem" role="alert" title={error}>{error}</span>}
      {(startable || why) && (
        <button type="button" disabled={submitting || !startable} title={why} aria-label={t().vms.startVm(name)} onClick={() => void start()}>
          {t().vms.start}
        </button>
      )}
    </>
  );
}
