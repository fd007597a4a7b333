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
import { FaultBadges, isUnstored } from "./agent-faults";
import { isMeasured } from "./rows";

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
        <a href={vmAddress(vm.instance_id)} title={details(vm)}>{name}</a>
        <span class="sub">{vm.name === null ? vm.hypervisor : vm.instance_id}</span>
      </th>
      <td class="state"><MachineBadge state={vm.state} /></td>
      <td class="number cpu">{cpu === null ? none : <Meter value={cpu} />}</td>
      <td class="hour"><Sparkline values={vm.cpu_sparkline} /></td>
      <td class="number mem">{mem === null ? none : <Meter value={mem} hot={90} />}</td>
      <td class="number net">{net === null ? none : rate(net)}</td>
      <td class="number disk">{disk === null ? none : rate(disk)}</td>
      <td class="report">
        <Report agent={vm.agent} at={vm.last_report_at} /><FaultBadges faults={vm.agent_faults} />
        {measured && <span class="sub" title={texts.vms.measuredTitle}>{texts.vms.measured}</span>}
      </td>
      {acts && <td class="act"><StartButton id={vm.instance_id} name={name} state={vm.state} /></td>}
    </tr>
  );
}

/** Name, id, hypervisors and labels, one per line. */
function details({ name, instance_id, hypervisor, also_on, labels }: Vm): string {
  const lines = [name, instance_id, hypervisor, ...also_on, ...Object.entries(labels).map((label) => label.join("="))];
  return [...new Set(lines)].filter(Boolean).join("\n");
}

function Report({ agent, at }: { agent: Vm["agent"]; at: string | null }) {
  if (agent === "silent") {
    return (
      <>
        <Badge tone="warn">{t().agent.silent}</Badge>
        <span class="sub">{at && ago(ms(at), now.value)}</span>
      </>
    );
  }
  if (agent === "reporting" && at) return <span class="faint">{ago(ms(at), now.value)}</span>;
  return <span class="faint">{t().agent[agent ?? "none"]}</span>;
}

/** Starts a stopped VM and shows the progress of the operation. */
function StartButton({ id, name, state }: { id: string; name: string; state: Vm["state"] }) {
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
  const startable = state === "shut_off" || state === "crashed" || state === "paused";
  return (
    <>
      {error && <span class="problem" role="alert" title={error}>{error}</span>}
      {startable && (
        <button type="button" disabled={submitting} aria-label={t().vms.startVm(name)} onClick={() => void start()}>
          {t().vms.start}
        </button>
      )}
    </>
  );
}
