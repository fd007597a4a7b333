//! Draws on a chart what is not a line: the pinned moment, the times of alerts, and the moments of operations and starts.
import type uPlot from "uplot";
import type { Severity } from "../../alerts";
import type { Mark } from "./alerts";
import type { Moment } from "./marks";

/** Height of the bar that marks an alert, in pixels of the page. */
const BAR = 4;
/** Distance of the bar from the area of the lines. */
const GAP = 1;
/** Minimum width of such a bar, so that a short alert is visible. */
const MIN_WIDTH = 3;
const COLOURS: Record<Severity, string> = { critical: "--bad", warning: "--mark-warn", info: "--busy" };

/** Draws a bar above the lines for each alert, and tints the chart of the measure that the alert is about. */
export function drawMarks(chart: uPlot, marks: Mark[], colour: (property: string) => string): void {
  const { left, top, width, height } = chart.bbox;
  const { ctx } = chart;
  ctx.save();
  for (const { from, to, severity, chart: own } of marks) {
    const begin = Math.max(left, chart.valToPos(from / 1000, "x", true));
    const end = Math.min(left + width, Number.isFinite(to) ? chart.valToPos(to / 1000, "x", true) : left + width);
    if (!(end >= left && begin <= left + width)) continue;
    const wide = Math.max(MIN_WIDTH * devicePixelRatio, end - begin);
    ctx.fillStyle = colour(COLOURS[severity] ?? "--bad");
    ctx.fillRect(begin, top - (BAR + GAP) * devicePixelRatio, wide, BAR * devicePixelRatio);
    if (own === undefined) continue;
    ctx.globalAlpha = 0.08;
    ctx.fillRect(begin, top, wide, height);
    ctx.globalAlpha = 1;
  }
  ctx.restore();
}

const MOMENT_COLOURS: Record<Moment["kind"], string> = { operation: "--busy", vm_start: "--good", agent_start: "--line-strong" };
/** Half the width of the triangle on the time axis, and its height, in pixels of the page. */
const TRIANGLE = 4;
const DASH = 3;

/** Draws a dashed line with a triangle on the time axis for each moment. */
export function drawMoments(chart: uPlot, moments: Moment[], colour: (property: string) => string): void {
  const { left, top, width, height } = chart.bbox;
  const { ctx } = chart;
  const bottom = top + height;
  const [size, dash] = [TRIANGLE * devicePixelRatio, DASH * devicePixelRatio];
  ctx.save();
  ctx.lineWidth = devicePixelRatio;
  ctx.setLineDash([dash, dash]);
  for (const { at, kind } of moments) {
    const x = chart.valToPos(at / 1000, "x", true);
    if (!(x >= left && x <= left + width)) continue;
    ctx.strokeStyle = ctx.fillStyle = colour(MOMENT_COLOURS[kind] ?? "--line-strong");
    ctx.beginPath();
    ctx.moveTo(x, top);
    ctx.lineTo(x, bottom);
    ctx.stroke();
    ctx.beginPath();
    ctx.moveTo(x - size, bottom);
    ctx.lineTo(x + size, bottom);
    ctx.lineTo(x, bottom - size);
    ctx.fill();
  }
  ctx.restore();
}

export function drawPin(chart: uPlot, pin: number | null, colour: string): void {
  if (pin === null) return;
  const x = chart.valToPos(pin / 1000, "x", true);
  const { left, top, width, height } = chart.bbox;
  if (x < left || x > left + width) return;
  const { ctx } = chart;
  ctx.save();
  ctx.strokeStyle = colour;
  ctx.lineWidth = 2 * devicePixelRatio;
  ctx.beginPath();
  ctx.moveTo(x, top);
  ctx.lineTo(x, top + height);
  ctx.stroke();
  ctx.restore();
}
