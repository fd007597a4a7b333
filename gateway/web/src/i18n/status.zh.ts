import { whole } from "../format";
import type { statusEn } from "./status.en";

/** Chinese texts about the state of vmwatch itself. */
export const statusZh: typeof statusEn = {
  title: "系统状态",
  hint: "vmwatch 自身的运行状态，每十秒刷新一次。",
  outdated: "无法刷新状态，正在自动重试…",
  level: { good: "正常", attention: "需要处理", unavailable: "无法获取" },
  parts: {
    programs: "程序", samples: "等待保存的采样", compaction: "数据合并", disk: "数据库磁盘", agents: "Agent", hypervisors: "虚拟化平台",
  },
  unknown: "暂时无法获取。",
  replicas: (count, versions) => (count === 0 ? "没有实例响应" : `${whole(count)} 个实例，${versions}`),
  samples: { messages: "消息数", size: "大小", oldest: "最早一条", deadLetters: "死信" },
  ofMost: (used, most) => `${used} / ${most}`,
  compaction: {
    lag: "最早的未合并时段", noLag: "无", passed: "上次完整执行", ago: (time) => `${time}前`,
    never: "数据合并尚未完整执行过。",
  },
  disk: {
    used: "已用", growth: "每日增长", left: "剩余天数", isUnknown: "数据库未报告其文件系统的大小。",
    notYet: "测量时间不足", noLimit: "没有增长",
  },
  agents: {
    reporting: "上报正常", silent: "上报中断", never: "从未上报", outdated: "版本过旧", over_limit: "超出上限",
    wrong_clock: "时钟或 UTC 偏移错误", other_faults: "其他问题",
  },
  more: (count) => `等，另有 ${whole(count)} 台`,
  noHypervisors: "未配置虚拟化平台。",
  hypervisor: { reachable: "可连接", late: "响应缓慢", unreachable: "无法连接" },
  listed: (time) => `${time}前更新`,
  neverListed: "从未更新",
};
