import type { Signal } from "@preact/signals";
import { useMemo } from "preact/hooks";
import { clock, fullTime, percent, rate, tenths, wholePercent } from "../../format";
import { t } from "../../i18n";
import type { Mark } from "./alerts";
import { Chart, type Line } from "./chart";
import type { Moment } from "./marks";
import { type Range, showBetween } from "./range";
import type { BySource, VmMeasure } from "./series";

interface ChartsProps {
  values: BySource;
  range: Range;
  /** Times of alerts. */
  marks: Mark[];
  /** Moments of operations and starts, which are marked on all charts. */
  moments: Moment[];
  hover: Signal<number | null>;
  click: (at: number) => void;
}

export function Charts({ values, range, marks, moments, hover, click }: ChartsProps) {
  const texts = t().vm;
  const { charts, chartUnits: units, series } = texts;
  const { at, agent, hypervisor } = values;
  const lines = useMemo(() => {
    // Measures that the source does not know have no line.
    const isKnown = (line: Line) => line.stats.some(Boolean);
    const measured = (name: string, colour: string, measure: VmMeasure): Line[] => {
      if (!hypervisor) return [];
      const stats = hypervisor[measure];
      const line = agent ? { name: series.byHypervisor(name), colour, stats, dashed: true } : { name, colour, stats };
      return [line].filter(isKnown);
    };
    const reported = (name: string, colour: string, measure: VmMeasure): Line[] =>
      agent ? [{ name, colour, stats: agent[measure] }] : [];
    const known = (...of: Parameters<typeof reported>) => reported(...of).filter(isKnown);
    const both = (...of: Parameters<typeof reported>) => ({ agent: reported(...of), hypervisor: measured(...of) });
    const rates = (...pair: ReturnType<typeof both>[]) =>
      [...pair.flatMap((one) => one.agent), ...pair.flatMap((one) => one.hypervisor)];
    const [cpu, mem] = [both(series.cpu, "--chart-1", "cpu_util"), both(series.mem, "--chart-2", "mem")];
    return {
      cpu: [
        ...cpu.agent, ...known(series.steal, "--chart-3", "steal"),
        ...cpu.hypervisor, ...measured(series.steal, "--chart-3", "steal"),
      ],
      load: [...known(series.load, "--chart-1", "load"), ...known(series.cores, "--chart-3", "cores")],
      pressure: [
        ...known(series.cpu, "--chart-1", "pressure_cpu"),
        ...known(series.mem, "--chart-2", "pressure_mem"),
        ...known(series.io, "--chart-3", "pressure_io"),
      ],
      mem: [...mem.agent, ...known(series.swap, "--chart-3", "swap"), ...mem.hypervisor],
      net: rates(both(series.in, "--chart-1", "net_incoming"), both(series.out, "--chart-3", "net_outgoing")),
      disk: rates(both(series.read, "--chart-1", "disk_read"), both(series.write, "--chart-3", "disk_write")),
    };
  }, [agent, hypervisor, series]);
  // An alert without a chart of its own is marked on all of them.
  const marked = useMemo(() => {
    const of = (chart: string) => marks.filter((mark) => mark.chart === undefined || mark.chart === chart);
    return { cpu: of("cpu"), load: of("load"), pressure: of("pressure"), mem: of("mem"), net: of("net"), disk: of("disk") };
  }, [marks]);
  const common = { at, moments, from: range.from, to: range.to, pin: range.pin, hover, click, zoom: showBetween };
  return (
    <section aria-label={charts.label}>
      <div class="charts" role="group" aria-label={charts.label} tabIndex={0}>
        <Chart {...common} id="cpu" title={charts.cpu} unit={units.cpu} lines={lines.cpu} marks={marked.cpu} top={100} format={percent} mark={wholePercent} />
        {lines.load.length > 0 && (
          <Chart {...common} id="load" title={charts.load} unit={units.load} lines={lines.load} marks={marked.load} format={tenths} mark={tenths} />
        )}
        {lines.pressure.length > 0 && (
          <Chart {...common} id="pressure" title={charts.pressure} unit={units.pressure} lines={lines.pressure} marks={marked.pressure} top={100} format={percent} mark={wholePercent} />
        )}
        {lines.mem.length > 0 && (
          <Chart {...common} id="mem" title={charts.mem} unit={units.mem} lines={lines.mem} marks={marked.mem} top={100} format={percent} mark={wholePercent} />
        )}
        {lines.net.length > 0 && (
          <Chart {...common} id="net" title={charts.net} unit={units.net} lines={lines.net} marks={marked.net} format={rate} mark={rate} />
        )}
        {lines.disk.length > 0 && (
          <Chart {...common} id="disk" title={charts.disk} unit={units.disk} lines={lines.disk} marks={marked.disk} format={rate} mark={rate} />
        )}
      </div>
      <Scrubber at={at} range={range} hover={hover} click={click} />
      {hypervisor && <SourceNote isAlone={!agent} />}
    </section>
  );
}

/** Says what the hypervisor measured, and how that differs from what the agent reports. */
function SourceNote({ isAlone }: { isAlone: boolean }) {
  const { measured } = t().vm;
  if (isAlone) return <p class="faint small sources">{measured.alone}</p>;
  return (
    <details class="faint small sources">
      <summary><i class="swatch dashed" />{measured.dashed}</summary>
      <ul>{measured.differences.map((difference) => <li key={difference}>{difference}</li>)}</ul>
    </details>
  );
}

/** Slider that selects a moment by keyboard or touch. */
function Scrubber({ at, range, hover, click }: { at: number[] } & Omit<ChartsProps, "values" | "marks" | "moments">) {
  const moment = hover.value ?? range.pin ?? at.at(-1) ?? range.to;
  const nearest = at.reduce((best, time, index) => (Math.abs(time - moment) < Math.abs((at[best] ?? 0) - moment) ? index : best), 0);
  const time = range.to - range.from > 86_400_000 ? fullTime : clock;
  const selected = (event: Event) => at[Number((event.currentTarget as HTMLInputElement).value)] ?? null;
  return (
    <input
      type="range" class="scrubber" min={0} max={Math.max(0, at.length - 1)} value={nearest} data-testid="scrubber"
      aria-label={t().vm.moment} aria-valuetext={time(moment)}
      onInput={(event) => (hover.value = selected(event))}
      onChange={(event) => {
        const chosen = selected(event);
        hover.value = null;
        if (chosen !== null) click(chosen);
      }}
    />
  );
}
