import { whole } from "../format";

/** English texts about what changed between two moments. */
export const changesEn = {
  open: "What changed?",
  title: "What changed",
  before: "Before",
  after: "After",
  usePinned: "Use pinned moment",
  usePinnedFor: (moment: string) => `Use pinned moment as ${moment}`,
  sortBy: "Sort by",
  measures: { cpu: "CPU", mem: "Memory", disk: "Disk" },
  order: "Choose a moment before that is earlier than the moment after.",
  noTable: (moment: string) => `There is no process table at or before the moment “${moment}”. Choose another moment.`,
  compared: (before: string, countBefore: string, after: string, countAfter: string) =>
    `Processes at ${before} (${countBefore}) compared with ${after} (${countAfter}).`,
  rebooted: (at: string) => `VM started ${at}`,
  incomplete: "The agent reports only the processes with the highest usage, so a process may seem to come or go although it runs all the time.",
  sameTable: "Both moments have the same process table, because there is no sample between them.",
  nothing: "No process came, went, grew or was restarted.",
  restarted: "restarted",
  kinds: {
    came: (count: number) => `Came (${whole(count)})`,
    went: (count: number) => `Went (${whole(count)})`,
    grew: (count: number) => `Grew (${whole(count)})`,
    restarted: (count: number) => `Restarted (${whole(count)})`,
  },
  more: (count: number) => `${whole(count)} more are not shown.`,
  columns: { name: "Process", owner: "Unit or container, user", processes: "Number" },
};

/** English texts about operations and starts that are marked on charts. */
export const marksEn = {
  title: (count: number) => (count === 1 ? "1 operation or start in this time range" : `${whole(count)} operations and starts in this time range`),
  starts: { vm_start: "VM started", agent_start: "Agent started" },
  operation: (action: string, user: string) => `${action}, requested by ${user}`,
  missing: {
    operations: "Operations could not be read, so their marks are missing.",
    processes: "Process tables could not be read, so the starts of the VM and its agent are not marked.",
  },
  show: "Show the processes at this moment",
  changesOf: (mark: string) => `What changed? ${mark}`,
  cut: (count: string) => `Only the newest ${count} are listed. Choose a shorter time range to see the others.`,
};
