//! Shows how much of the VM's CPU time the processes of a moment explain, and why processes are hidden.
import type { Schemas } from "../../api/client";
import { tenths, wholePercent } from "../../format";
import { t } from "../../i18n";
import type { Table } from "./process-data";

/** Below this share, processes that the table does not list used much of the CPU. */
const WELL_ACCOUNTED = 0.8;
/** The kernel counts CPU time in ticks of 10 ms; the share of so little time says nothing. */
const LEAST_SECONDS = 0.1;

/** The share of the VM's CPU time that the processes of the table explain; null if it is unknown. */
function shareOf({ vm_cpu: vm, cpu_seconds: explained }: Table): { share: number; total: number } | null {
  if (vm === null) return null;
  const total = vm.user + vm.nice + vm.system;
  return total < LEAST_SECONDS ? null : { share: explained / total, total };
}

export function Accounted({ table }: { table: Table }) {
  const texts = t().table.accounted;
  const known = shareOf(table);
  if (!known) {
    return (
      <p class="accounted" title={texts.unknownHint}>
        {texts.label} <b>{t().common.unknown}</b>
      </p>
    );
  }
  const { share, total } = known;
  const low = share < WELL_ACCOUNTED;
  return (
    <p class={low ? "accounted low" : "accounted"} title={texts.hint}>
      {texts.label} <b>{wholePercent(share * 100)}</b>
      <span class="bar" aria-hidden="true"><span style={{ width: `${Math.min(100, share * 100)}%` }} /></span>
      <span class="faint">{texts.seconds(tenths(table.cpu_seconds), tenths(total))}</span>
      {table.short_lived === "estimated" && <span class="faint"> {texts.estimated}</span>}
    </p>
  );
}

/** Says that the agent cannot see all processes, and what to do about it. */
export function HiddenNote({ restricted }: { restricted: Schemas["Restriction"] | null }) {
  if (restricted === null) return null;
  const { title, remedies, unknownRemedy } = t().table.hidden;
  // A newer version of the gateway may know more restrictions.
  const remedy = (remedies as Record<string, string>)[restricted] ?? unknownRemedy;
  return (
    <p class="banner warn" role="status">
      <span><b>{title}</b> {remedy}</span>
    </p>
  );
}
