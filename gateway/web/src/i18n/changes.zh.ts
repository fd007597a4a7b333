import { whole } from "../format";
import type { changesEn, marksEn } from "./changes.en";

/** Chinese texts about what changed between two moments. */
export const changesZh: typeof changesEn = {
  open: "有何变化？",
  title: "变化对比",
  before: "之前",
  after: "之后",
  usePinned: "使用固定的时刻",
  usePinnedFor: (moment) => `使用固定的时刻作为“${moment}”`,
  sortBy: "排序依据",
  measures: { cpu: "CPU", mem: "内存", disk: "磁盘" },
  order: "“之前”的时刻必须早于“之后”的时刻。",
  noTable: (moment) => `“${moment}”时刻及其之前没有进程数据，请选择其他时刻。`,
  compared: (before, countBefore, after, countAfter) => `${before}（${countBefore} 个进程）与 ${after}（${countAfter} 个进程）的对比。`,
  rebooted: (at) => `虚拟机于 ${at} 启动`,
  incomplete: "Agent 只上报资源占用最高的进程，因此一直在运行的进程也可能显示为出现或消失。",
  sameTable: "两个时刻之间没有采样，因此对应同一份进程数据。",
  nothing: "没有进程出现、消失、增长或重启。",
  restarted: "已重启",
  kinds: {
    came: (count) => `出现（${whole(count)}）`,
    went: (count) => `消失（${whole(count)}）`,
    grew: (count) => `增长（${whole(count)}）`,
    restarted: (count) => `重启（${whole(count)}）`,
  },
  more: (count) => `另有 ${whole(count)} 项未显示。`,
  columns: { name: "进程", owner: "单元或容器、用户", processes: "数量" },
};

/** Chinese texts about operations and starts that are marked on charts. */
export const marksZh: typeof marksEn = {
  title: (count) => `该时间范围内有 ${whole(count)} 次操作或启动`,
  starts: { vm_start: "虚拟机启动", agent_start: "Agent 启动" },
  operation: (action, user) => `${action}，由 ${user} 发起`,
  missing: {
    operations: "无法读取操作记录，图表上缺少操作标记。",
    processes: "无法读取进程数据，图表上缺少虚拟机和 Agent 的启动标记。",
  },
  show: "查看该时刻的进程",
  changesOf: (mark) => `有何变化？${mark}`,
  cut: (count) => `仅列出最新的 ${count} 项。缩短时间范围可查看其余各项。`,
};
