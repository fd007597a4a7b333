import { whole } from "../format";

/** English texts about the state of vmwatch itself. */
export const statusEn = {
  title: "Status",
  hint: "The state of vmwatch itself. It is read again every ten seconds.",
  outdated: "Could not refresh the status. Retrying automatically…",
  level: { good: "OK", attention: "needs attention", unavailable: "unavailable" },
  parts: {
    programs: "Programs", samples: "Waiting samples", compaction: "Compaction", disk: "Disk of the database",
    agents: "Agents", hypervisors: "Hypervisors",
  },
  unknown: "Not known at the moment.",
  replicas: (count: number, versions: string) =>
    count === 0 ? "no replica answers" : `${count === 1 ? "1 replica" : `${whole(count)} replicas`}, ${versions}`,
  samples: { messages: "Messages", size: "Size", oldest: "Oldest", deadLetters: "Dead letters" },
  ofMost: (used: string, most: string) => `${used} of ${most}`,
  compaction: {
    lag: "Oldest hour to merge", noLag: "none", passed: "Last complete pass", ago: (time: string) => `${time} ago`,
    never: "Compaction has not completed a pass yet.",
  },
  disk: {
    used: "In use", growth: "Growth per day", left: "Days left", isUnknown: "The database does not report the size of its file system.",
    notYet: "not measured long enough", noLimit: "it does not grow",
  },
  agents: {
    reporting: "Reporting", silent: "Silent", never: "Never reported", outdated: "Outdated", over_limit: "Above a limit",
    wrong_clock: "Wrong clock or UTC offset", other_faults: "Other faults",
  },
  more: (count: number) => `and ${whole(count)} more`,
  noHypervisors: "No hypervisor is configured.",
  hypervisor: { reachable: "reachable", late: "slow", unreachable: "unreachable" },
  listed: (time: string) => `listed ${time} ago`,
  neverListed: "never listed",
};
