//! Header of the VM page: name, state, facts, actions and the latest operation.
import type { VmDetail } from "../../api/client";
import { now } from "../../clock";
import { ago, ms, whole } from "../../format";
import { t } from "../../i18n";
import { forget, latest } from "../../operations";
import { Badge, isOver, MachineBadge } from "../../parts/badge";
import { OperationCard } from "../operations";
import { isMeasured } from "../rows";
import { Actions } from "./actions";
import { Labels } from "./labels";
import { Removal } from "./removal";

export function Header({ vm }: { vm: VmDetail }) {
  const texts = t().vm;
  const operation = latest.value.get(vm.instance_id);
  const name = vm.name ?? vm.instance_id;
  return (
    <header class="vm">
      <div class="heading">
        <a class="back" href="/" aria-label={texts.back} title={texts.back}>←</a>
        <h1 tabIndex={-1}>{name}</h1>
        <MachineBadge state={vm.state} />
        {vm.agent !== "reporting" && <Badge tone={vm.agent === "silent" ? "warn" : "quiet"}>{t().agent[vm.agent ?? "none"]}</Badge>}
        {isMeasured(vm) && <Badge tone="quiet">{texts.measured.badge}</Badge>}
        {vm.state !== null && <Actions vm={vm} name={name} />}
      </div>
      <dl class="facts">
        <Fact name={texts.id}><span class="mono">{vm.instance_id}</span></Fact>
        {vm.hypervisor && <Fact name={texts.hypervisor}>{vm.hypervisor}</Fact>}
        {vm.last_report_at && <Fact name={texts.lastReport}>{ago(ms(vm.last_report_at), now.value)}</Fact>}
        {typeof vm.sample?.proc === "number" && <Fact name={texts.processes}>{whole(vm.sample.proc)}</Fact>}
        {vm.distribution && <Fact name={texts.distribution}>{vm.distribution}</Fact>}
        {vm.kernel && <Fact name={texts.kernel}><span class="mono">{vm.kernel}</span></Fact>}
        {vm.agent_version && (
          <Fact name={texts.agentVersion}>
            {vm.agent_version} {vm.agent_outdated && <Badge tone="quiet">{texts.outdated}</Badge>}
          </Fact>
        )}
        {vm.sample?.restricted && <Fact name={texts.processes}>{texts.hidden}</Fact>}
      </dl>
      <div class="manage">
        <Labels id={vm.instance_id} name={name} />
        <Removal vm={vm} name={name} />
      </div>
      {operation && (
        <div class="latest" role="status">
          <ul class="cards"><OperationCard operation={operation} open={!isOver(operation.state)} /></ul>
          {isOver(operation.state) && (
            <button type="button" aria-label={t().common.close} onClick={() => forget(vm.instance_id)}>✕</button>
          )}
        </div>
      )}
    </header>
  );
}

function Fact({ name, children }: { name: string; children: preact.ComponentChildren }) {
  return <div><dt>{name}</dt><dd>{children}</dd></div>;
}
