//! Shows why the samples of a VM may be wrong or are not stored: its clock, the UTC offset of its agent, or a second agent
//! with its id.
import type { Vm } from "../api/client";
import { duration } from "../format";
import { t } from "../i18n";
import { Badge } from "../parts/badge";

type Fault = Vm["agent_faults"][number];

/** The fault as a short text, and as a sentence with what to do; null for a fault that only a newer gateway knows. */
function describe(fault: Fault): { short: string; title: string; remedy: string } | null {
  const texts = t().agentFaults;
  switch (fault.kind) {
    case "clock": {
      const { short, title, remedy } = texts.clock;
      return { short, title: title(fault.ahead_ms > 0, duration(Math.abs(fault.ahead_ms))), remedy };
    }
    case "utc_offset": {
      const { short, title, remedy } = texts.utc_offset;
      return { short, title: title(fault.agent, fault.deployment), remedy: remedy(fault.deployment) };
    }
    case "two_agents":
      return texts.two_agents;
    case "expired_rows": {
      const { short, title, remedy } = texts.expired_rows;
      return { short, title: title(duration(fault.age_ms)), remedy };
    }
    case "date_ahead": {
      const { short, title, remedy } = texts.date_ahead;
      return { short, title: title(duration(fault.ahead_ms)), remedy };
    }
    default:
      return null;
  }
}

/** Whether the last samples of the VM were not stored, so that the values shown are old. */
export const isUnstored = (faults: Fault[]) => faults.some(({ kind }) => kind === "expired_rows" || kind === "date_ahead");

const describeAll = (faults: Fault[]) => faults.map(describe).filter((fault) => fault !== null);

/** One badge per fault, for a row of the list. */
export function FaultBadges({ faults }: { faults: Fault[] }) {
  return describeAll(faults).map(({ short, title }) => <Badge key={short} tone="warn" title={title}>{short}</Badge>);
}

/** Shows each fault of the agent and its remedy. */
export function FaultNotes({ faults }: { faults: Fault[] }) {
  return describeAll(faults).map(({ short, title, remedy }) => (
    <p class="banner warn" role="status" key={short}>
      <span><b>{title}</b> {remedy}</span>
    </p>
  ));
}
