//! History of one process, or of all processes with its name, over the time range of the VM charts.
import type { Signal } from "@preact/signals";
import { useMemo } from "preact/hooks";
import { api, ask } from "../../api/client";
import { useEvery, useResource } from "../../api/resource";
import { percent, rate, shortPercent } from "../../format";
import { t } from "../../i18n";
import { Failed, Loading } from "../../parts/states";
import { Choice } from "../../parts/switches";
import { adjust, route } from "../../router";
import { Chart, type Line } from "./chart";
import { points } from "./page";
import { type Range, RANGES, showBetween } from "./range";
import { columns } from "./series";

const REFRESH_MS = 10_000;
const MEASURES = ["cpu_util", "mem", "disk_read", "disk_write"] as const;

interface ProcessHistoryProps {
  id: string;
  /** The range shown; it advances with the clock when live. */
  range: Range;
  /** The range as chosen; it stays the same while live, so data is not read again every second. */
  chosen: Range;
  hover: Signal<number | null>;
  click: (at: number) => void;
}

export function ProcessHistory(props: ProcessHistoryProps) {
  const { query } = route.value;
  const name = query.get("process");
  const pid = query.get("pid");
  if (name === null) return null;
  return <Shown {...props} key={`${name} ${pid ?? ""}`} name={name} pid={pid === null ? null : Number(pid)} />;
}

function Shown({ id, range, chosen, hover, click, name, pid }: ProcessHistoryProps & { name: string; pid: number | null }) {
  const texts = t().history;
  const all = route.value.query.get("all") !== null || pid === null;
  const time = chosen.live ? chosen.name : `${chosen.from} ${chosen.to}`;
  const series = useResource(
    (signal) => {
      const to = chosen.live ? Date.now() : chosen.to;
      const from = chosen.live ? to - RANGES[chosen.name] : chosen.from;
      const query = {
        name, from: new Date(from).toISOString(), to: new Date(to).toISOString(), points: points(),
        ...(!all && { pid }),
      };
      const params = { path: { instance_id: id }, query };
      return ask(api.GET("/api/v1/vms/{instance_id}/processes/history", { params, signal }));
    },
    [id, name, pid, all, time],
  );
  useEvery(REFRESH_MS, () => chosen.live && series.reload());
  const shown = useMemo(() => series.data && columns(series.data.buckets, series.data.step_ms, MEASURES), [series.data]);
  const lines = useMemo(() => {
    const line = (label: string, colour: string, measure: (typeof MEASURES)[number]): Line =>
      ({ name: label, colour, stats: shown?.stats[measure] ?? [] });
    return {
      cpu: [line(texts.cpu, "--chart-1", "cpu_util")],
      mem: [line(texts.mem, "--chart-2", "mem")],
      disk: [line(t().vm.series.read, "--chart-1", "disk_read"), line(t().vm.series.write, "--chart-3", "disk_write")],
    };
  }, [shown, texts]);
  const common = { from: range.from, to: range.to, pin: range.pin, hover, click, zoom: showBetween, at: shown?.at ?? [] };
  const close = () => adjust({ process: null, pid: null, all: null });
  return (
    <section class="history" aria-label={texts.title(name)}>
      <div class="heading">
        <h2>{texts.title(name)}</h2>
        {pid !== null && (
          <Choice
            label={texts.title(name)} options={[["one", texts.one(pid)], ["all", texts.all]] as const}
            value={all ? "all" : "one"} choose={(choice) => adjust({ all: choice === "all" ? "1" : null }, true)}
          />
        )}
        <button type="button" class="close" aria-label={texts.close} onClick={close}>✕</button>
      </div>
      {!shown ? (
        series.failure ? <Failed failure={series.failure} retry={series.reload} /> : <Loading rows={2} />
      ) : shown.at.length === 0 ? (
        <p class="faint">{texts.empty}</p>
      ) : (
        <div class="charts three" role="group" aria-label={texts.title(name)} tabIndex={0}>
          <Chart {...common} id="process-cpu" title={t().vm.charts.cpu} unit={texts.cpu} lines={lines.cpu} format={percent} mark={shortPercent} />
          <Chart {...common} id="process-mem" title={t().vm.charts.mem} unit={texts.mem} lines={lines.mem} format={percent} mark={shortPercent} />
          <Chart {...common} id="process-disk" title={t().vm.charts.disk} unit={t().vm.chartUnits.disk} lines={lines.disk} format={rate} mark={rate} />
        </div>
      )}
    </section>
  );
}
