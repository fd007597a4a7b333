//! Shows why the samples of a VM may be wrong, late or not stored: its clock, the UTC offset of its agent, a second agent
//! with its id, or a limit that it is above.
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
    case "over_limit": {
      const limit = fault.limit === "unknown" ? undefined : texts.over_limit.limits[fault.limit];
      return limit ? { ...limit, title: limit.title(duration(fault.for_ms)) } : null;
    }
    default:
      return null;
  }
}

/** Whether the last samples of the VM were not stored, so that the values shown are old. */
export const isUnstored = (faults: Fault[]) => faults.some(({ kind }) => kind === "expired_rows" || kind === "date_ahead");

const describeAll = (faults: Fault[]) => faults.map(describe).filter((fault) => fault !== null);

/** The first fault and the number of further ones, for a row of the list; null without faults. */
export function FaultBadge({ faults }: { faults: Fault[] }) {
  const [first, ...others] = describeAll(faults);
  if (!first) return null;
  return (
    <>
      <Badge tone="warn" title={first.title}>{first.short}</Badge>
      {others.length > 0 && <span class="faint" title={others.map(({ title }) => title).join("\n")}> +{others.length}</span>}
    </>
  );
}

/** Shows each fault of the agent and its remedy. */
export function FaultNotes({ faults }: { faults: Fault[] }) {
  return describeAll(faults).map(({ short, title, remedy }) => (
    <p class="banner warn" role="status" key={short}>
      <span><b>{title}</b> {remedy}</span>
    </p>
  ));
}
