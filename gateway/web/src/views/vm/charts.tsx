import type { Signal } from "@preact/signals";
import { useMemo } from "preact/hooks";
import { clock, fullTime, percent, rate, tenths, wholePercent } from "../../format";
import { t } from "../../i18n";
import { Chart, type Line } from "./chart";
import { type Range, showBetween } from "./range";
import type { Columns, VmMeasure } from "./series";

interface ChartsProps {
  columns: Columns<VmMeasure>;
  range: Range;
  hover: Signal<number | null>;
  click: (at: number) => void;
}

export function Charts({ columns, range, hover, click }: ChartsProps) {
  const texts = t().vm;
  const { charts, chartUnits: units, series } = texts;
  const { at, stats } = columns;
  const lines = useMemo(() => {
    const line = (name: string, colour: string, measure: VmMeasure): Line => ({ name, colour, stats: stats[measure] });
    // Measures that the kernel of the VM does not report have no line.
    const known = (...lines: Line[]) => lines.filter((line) => line.stats.some((stat) => stat !== null));
    return {
      cpu: [line(series.cpu, "--chart-1", "cpu_util"), ...known(line(series.steal, "--chart-3", "steal"))],
      load: known(line(series.load, "--chart-1", "load"), line(series.cores, "--chart-3", "cores")),
      pressure: known(
        line(series.cpu, "--chart-1", "pressure_cpu"),
        line(series.mem, "--chart-2", "pressure_mem"),
        line(series.io, "--chart-3", "pressure_io"),
      ),
      mem: [line(series.mem, "--chart-2", "mem"), ...known(line(series.swap, "--chart-3", "swap"))],
      net: [line(series.in, "--chart-1", "net_incoming"), line(series.out, "--chart-3", "net_outgoing")],
      disk: [line(series.read, "--chart-1", "disk_read"), line(series.write, "--chart-3", "disk_write")],
    };
  }, [stats, series]);
  const common = { at, from: range.from, to: range.to, pin: range.pin, hover, click, zoom: showBetween };
  return (
    <section aria-label={charts.label}>
      <div class="charts" role="group" aria-label={charts.label} tabIndex={0}>
        <Chart {...common} id="cpu" title={charts.cpu} unit={units.cpu} lines={lines.cpu} top={100} format={percent} mark={wholePercent} />
        {lines.load.length > 0 && (
          <Chart {...common} id="load" title={charts.load} unit={units.load} lines={lines.load} format={tenths} mark={tenths} />
        )}
        {lines.pressure.length > 0 && (
          <Chart {...common} id="pressure" title={charts.pressure} unit={units.pressure} lines={lines.pressure} top={100} format={percent} mark={wholePercent} />
        )}
        <Chart {...common} id="mem" title={charts.mem} unit={units.mem} lines={lines.mem} top={100} format={percent} mark={wholePercent} />
        <Chart {...common} id="net" title={charts.net} unit={units.net} lines={lines.net} format={rate} mark={rate} />
        <Chart {...common} id="disk" title={charts.disk} unit={units.disk} lines={lines.disk} format={rate} mark={rate} />
      </div>
      <Scrubber at={at} range={range} hover={hover} click={click} />
    </section>
  );
}

/** Slider that selects a moment by keyboard or touch. */
function Scrubber({ at, range, hover, click }: { at: number[] } & Omit<ChartsProps, "columns">) {
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
