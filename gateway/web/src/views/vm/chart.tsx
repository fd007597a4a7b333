//! A time-series chart: averages as lines, each with a band from minimum to maximum.
import { effect, type Signal, useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import { tick } from "../../format";
import { t } from "../../i18n";
import { Badge } from "../../parts/badge";
import { dark, language } from "../../preferences";
import { SEVERITY } from "../alerts/card";
import type { Mark } from "./alerts";
import { drawMarks, drawMoments, drawPin } from "./drawing";
import type { Moment } from "./marks";
import type { Stats } from "./series";

export interface Line {
  name: string;
  /** The CSS custom property with its colour. */
  colour: string;
  stats: Stats;
  /** A dashed line has no band from minimum to maximum. */
  dashed?: boolean;
}

export interface ChartProps {
  id: string;
  title: string;
  unit: string;
  at: number[];
  lines: Line[];
  /** Times of alerts. */
  marks?: Mark[];
  /** Moments of operations and starts. */
  moments?: Moment[];
  /** The upper end of the y axis; if absent, it follows the data. */
  top?: number;
  format: (value: number) => string;
  /** A shorter format for the labels of the y axis. */
  mark: (value: number) => string;
  from: number;
  to: number;
  pin: number | null;
  /** The moment under the cursor, shared by all charts. */
  hover: Signal<number | null>;
  click: (at: number) => void;
  zoom: (from: number, to: number) => void;
}

/** A press that moves by less than this is a click, otherwise a drag. */
const CLICK_PX = 5;
/** Index for "no bucket under the cursor". */
const NO_BUCKET = -1;
/** Maximum distance between the cursor and the bucket it selects. */
const NEAR_PX = 24;
const HEIGHT = 124;
const NO_MARKS: Mark[] = [];
const NO_MOMENTS: Moment[] = [];
/** A moment is named if it is this near to the cursor, as a share of the time range. */
const NEAR_SHARE = 0.01;
/** Lengths of the dashes and of the gaps between them, in pixels. */
const DASH = [5, 4];
/** Axis steps for rates, whose units are multiples of 1024. */
const POWERS = Array.from({ length: 48 }, (_, index) => 2 ** (index - 6));

export function Chart(props: ChartProps) {
  const { title, unit, lines, format, at, marks = NO_MARKS, moments = NO_MOMENTS } = props;
  const host = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const latest = useRef(props);
  latest.current = props;
  const index = useSignal<number | null>(null);
  useEffect(() => {
    const element = host.current;
    if (!element) return;
    const chart = new uPlot(options(element, latest, index), table(latest.current), element);
    plot.current = chart;
    handlePointer(chart, element, latest);
    const sizes = new ResizeObserver(() => chart.setSize({ width: element.clientWidth, height: HEIGHT }));
    sizes.observe(element);
    const stop = effect(() => {
      const moment = latest.current.hover.value;
      if (chart.over.matches(":hover") && moment !== null) return;
      chart.setCursor({ left: moment === null ? -10 : chart.valToPos(moment / 1000, "x"), top: 0 });
    });
    return () => {
      stop();
      sizes.disconnect();
      chart.destroy();
    };
  }, [dark.value, language.value, lines.length]);
  useEffect(() => {
    plot.current?.setData(table(props), false);
    plot.current?.setScale("x", { min: props.from / 1000, max: props.to / 1000 });
  }, [at, lines, marks, moments, props.from, props.to, props.pin]);
  const shown = index.value ?? lastKnown(at, lines);
  return (
    <figure class="chart" data-chart={props.id}>
      <figcaption>
        <span class="title">{title}</span> <span class="unit">{unit}</span>
        <span class="values">
          {lines.map((line) => <Value key={line.name} line={line} index={shown} format={format} alone={lines.length === 1} />)}
        </span>
      </figcaption>
      <div class="frame">
        <div ref={host} class="plot" aria-hidden="true" />
        <MarkNames marks={marks} moments={moments} near={NEAR_SHARE * (props.to - props.from)} hover={props.hover} />
      </div>
    </figure>
  );
}

interface MarkNamesProps {
  marks: Mark[];
  moments: Moment[];
  /** Maximum distance of a moment from the cursor, in milliseconds. */
  near: number;
  hover: Signal<number | null>;
}

/** Names the alerts at the moment under the cursor, and the operations and starts near it. */
function MarkNames({ marks, moments, near, hover }: MarkNamesProps) {
  const moment = hover.value;
  if (moment === null) return null;
  const held = marks.filter(({ from, to }) => from <= moment && moment <= to);
  const close = moments.filter(({ at }) => Math.abs(at - moment) <= near);
  if (held.length + close.length === 0) return null;
  return (
    <div class="mark-names" aria-hidden="true">
      {close.map(({ text, kind, at }) => <Badge key={`${kind} ${at}`} tone="quiet">{text}</Badge>)}
      {held.map(({ text, severity, from }) => <Badge key={`${text} ${from}`} tone={SEVERITY[severity] ?? "bad"}>{text}</Badge>)}
    </div>
  );
}

function lastKnown(at: number[], lines: Line[]): number {
  let last = at.length - 1;
  while (last > 0 && !lines.some((line) => line.stats[last])) last--;
  return last;
}

interface ValueProps {
  line: Line;
  index: number;
  format: (value: number) => string;
  alone: boolean;
}

function Value({ line, index, format, alone }: ValueProps) {
  // Two sources have buckets at different times; each keeps its last value between them.
  let at = index;
  while (at > 0 && line.stats[at] === undefined) at--;
  const stat = line.stats[at];
  const mark = line.dashed
    ? <i class="swatch dashed" style={{ borderColor: `var(${line.colour})` }} />
    : <i class="swatch" style={{ background: `var(${line.colour})` }} />;
  return (
    <span class="value">
      {!alone && <>{mark}{line.name} </>}
      <b>{stat ? format(stat.avg) : t().common.none}</b>
      {stat && !line.dashed && stat.max > stat.min && (
        <span class="span"> {alone ? t().vm.between(format(stat.min), format(stat.max)) : t().vm.upTo(format(stat.max))}</span>
      )}
    </span>
  );
}

/** Data for uPlot: timestamps, then average, minimum and maximum of each line. */
function table({ at, lines }: ChartProps): uPlot.AlignedData {
  const column = (stats: Stats, part: "avg" | "min" | "max") => stats.map((stat) => stat && stat[part]);
  return [
    at.map((time) => time / 1000),
    ...lines.flatMap(({ stats }) => [column(stats, "avg"), column(stats, "min"), column(stats, "max")]),
  ];
}

function options(host: HTMLElement, latest: { current: ChartProps }, index: Signal<number | null>): uPlot.Options {
  const styles = getComputedStyle(host);
  const colour = (property: string) => styles.getPropertyValue(property).trim();
  const font = `11px ${styles.fontFamily}`;
  const axis = { stroke: colour("--faint"), font, grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false } };
  const { lines, top } = latest.current;
  const band = (line: Line): uPlot.Series => ({ stroke: "transparent", width: 0, points: { show: false }, label: line.name });
  return {
    width: host.clientWidth,
    height: HEIGHT,
    legend: { show: false },
    // The last time of the axis extends to the right of the plot.
    padding: [8, 18, 0, 0],
    cursor: {
      y: false,
      points: { size: 7 },
      drag: { x: true, y: false, setScale: false },
    },
    scales: {
      x: { time: true, auto: false },
      y: { range: (_, __, greatest) => [0, top ?? Math.max(1, (greatest ?? 0) * 1.1)] },
    },
    axes: [
      { ...axis, size: 34, space: 70, values: (_, splits, __, ___, distance) => ticks(splits, distance) },
      {
        ...axis, size: 72, space: 30, ...(top === undefined && { incrs: POWERS }),
        values: (_, splits) => splits.map((value) => latest.current.mark(value)),
      },
    ],
    series: [
      {},
      ...lines.flatMap((line): uPlot.Series[] => [
        {
          label: line.name, stroke: colour(line.colour), width: 1.5, points: { show: false },
          ...(line.dashed && { dash: DASH }),
        },
        band(line),
        band(line),
      ]),
    ],
    bands: lines.map((line, at) => ({
      series: [3 * at + 3, 3 * at + 2], fill: line.dashed ? "transparent" : `${colour(line.colour)}33`,
    })),
    hooks: {
      setCursor: [(chart) => {
        const { left = -1, idx = null } = chart.cursor;
        const bucket = idx === null ? undefined : latest.current.at[idx];
        const near = bucket !== undefined && Math.abs(chart.valToPos(bucket / 1000, "x") - left) < NEAR_PX;
        index.value = left >= 0 && near ? idx : left >= 0 ? NO_BUCKET : null;
        if (!chart.over.matches(":hover")) return;
        const moment = near ? bucket : chart.posToVal(left, "x") * 1000;
        // A chart that has just been created under the pointer has no scale yet.
        latest.current.hover.value = left >= 0 && Number.isFinite(moment) ? moment : null;
      }],
      draw: [(chart) => {
        drawMoments(chart, latest.current.moments ?? NO_MOMENTS, colour);
        drawMarks(chart, latest.current.marks ?? NO_MARKS, colour);
        drawPin(chart, latest.current.pin, colour("--accent"));
      }],
    },
  };
}

function ticks(splits: number[], distance: number): string[] {
  return splits.map((split, index) => {
    const day = (at: number | undefined) => at !== undefined && new Date(at * 1000).toDateString();
    return tick(split * 1000, distance * 1000, index === 0 || day(splits[index - 1]) !== day(split));
  });
}

/** Handles click (pin), drag (zoom) and the pointer leaving the chart. */
function handlePointer(chart: uPlot, host: HTMLElement, latest: { current: ChartProps }): void {
  let pressed: number | null = null;
  const x = (event: MouseEvent) => event.clientX - chart.over.getBoundingClientRect().left;
  chart.over.addEventListener("mousedown", (event) => (pressed = event.button === 0 ? x(event) : null));
  chart.over.addEventListener("mouseup", (event) => {
    if (pressed === null) return;
    const [one, other] = [pressed, x(event)].sort((a, b) => a - b) as [number, number];
    pressed = null;
    const moment = (left: number) => chart.posToVal(left, "x") * 1000;
    if (other - one < CLICK_PX) latest.current.click(latest.current.hover.peek() ?? moment(other));
    else latest.current.zoom(moment(one), moment(other));
    chart.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
  });
  host.addEventListener("mouseleave", () => (latest.current.hover.value = null));
  // Disable uPlot's zoom reset on double click, because the Back button undoes a zoom.
  chart.over.addEventListener("dblclick", (event) => event.stopImmediatePropagation(), { capture: true });
}
