//! Formats times, and numbers with units, in the selected language and the browser's time zone.
import { computed } from "@preact/signals";
import { t } from "./i18n";
import { language } from "./preferences";

const formats = computed(() => {
  const tag = language.value === "en" ? "en-GB" : language.value;
  const time = (options: Intl.DateTimeFormatOptions) => new Intl.DateTimeFormat(tag, { hourCycle: "h23", ...options });
  return {
    tenths: new Intl.NumberFormat(tag, { maximumFractionDigits: 1, minimumFractionDigits: 1 }),
    whole: new Intl.NumberFormat(tag, { maximumFractionDigits: 0 }),
    clock: time({ hour: "2-digit", minute: "2-digit", second: "2-digit" }),
    minute: time({ hour: "2-digit", minute: "2-digit" }),
    day: time({ month: "short", day: "numeric" }),
    month: time({ month: "short", year: "numeric" }),
    full: time({
      year: "numeric", month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit",
    }),
    ago: new Intl.RelativeTimeFormat(tag, { numeric: "always" }),
  };
});

export const SECOND = 1_000;
export const MINUTE = 60 * SECOND;
export const HOUR = 60 * MINUTE;
export const DAY = 24 * HOUR;

export const tenths = (value: number): string => formats.value.tenths.format(value);
export const whole = (value: number): string => formats.value.whole.format(value);
export const wholePercent = (value: number): string => `${whole(value)}%`;
/** A label of a chart's percent axis; with one decimal below 10, where labels are close together. */
export const shortPercent = (value: number): string => (value < 10 ? percent : wholePercent)(value);
export const percent = (value: number): string => `${tenths(value)}%`;

/** The sum of two values; null if either is unknown. */
export const sum = (one: number | null, other: number | null): number | null =>
  one === null || other === null ? null : one + other;

/** Formats a rate given in KiB/s with the largest suitable unit. */
export const rate = (kib: number): string => inLargestUnit(kib, ["KiB/s", "MiB/s", "GiB/s", "TiB/s"]);
/** Formats a size given in bytes with the largest suitable unit. */
export const bytes = (size: number): string => inLargestUnit(size / 1024, ["KiB", "MiB", "GiB", "TiB", "PiB"]);

function inLargestUnit(kib: number, units: string[]): string {
  let value = kib;
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1024;
    unit++;
  }
  const number = value === 0 || value >= 100 ? whole(value) : tenths(value);
  return `${number} ${units[unit]}`;
}

export const ms = (timestamp: string): number => Date.parse(timestamp);
export const clock = (at: number): string => formats.value.clock.format(at);
export const fullTime = (at: number): string => formats.value.full.format(at);
/** Omits the date if it is today. */
export const shortTime = (at: number): string =>
  new Date(at).toDateString() === new Date().toDateString() ? clock(at) : fullTime(at);

/** Replaces invisible characters in text supplied by a guest with visible ones. */
export const visible = (text: string): string =>
  text.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, (character) => {
    const code = character.codePointAt(0) ?? 0;
    // Show control characters by their Unicode symbols, which exist for the C0 control characters and DEL.
    return code < 0x20 ? String.fromCodePoint(0x2400 + code) : code === 0x7f ? "\u2421" : "\ufffd";
  });

/** A label of a chart's time axis; its precision follows the distance to the next label. */
export function tick(at: number, distance: number, newDay: boolean): string {
  const { clock, minute, day, month } = formats.value;
  if (distance >= 28 * DAY) return month.format(at);
  if (distance >= DAY) return day.format(at);
  const text = (distance < MINUTE ? clock : minute).format(at);
  return newDay ? `${text}\n${day.format(at)}` : text;
}

export function ago(at: number, now: number): string {
  const passed = Math.max(0, now - at);
  const { ago } = formats.value;
  if (passed < MINUTE) return ago.format(-Math.round(passed / SECOND), "second");
  if (passed < HOUR) return ago.format(-Math.floor(passed / MINUTE), "minute");
  if (passed < DAY) return ago.format(-Math.floor(passed / HOUR), "hour");
  return ago.format(-Math.floor(passed / DAY), "day");
}

/** Formats a duration with its two largest units. */
export function duration(length: number): string {
  const { days, hours, minutes, seconds } = t().units;
  if (length < 10 * SECOND) return `${tenths(length / SECOND)} ${seconds}`;
  if (length < MINUTE) return `${whole(length / SECOND)} ${seconds}`;
  const pair = (large: number, largeUnit: string, small: number, smallUnit: string) =>
    `${large} ${largeUnit} ${small} ${smallUnit}`;
  if (length < HOUR) {
    return pair(Math.floor(length / MINUTE), minutes, Math.floor((length % MINUTE) / SECOND), seconds);
  }
  if (length < DAY) return pair(Math.floor(length / HOUR), hours, Math.floor((length % HOUR) / MINUTE), minutes);
  return pair(Math.floor(length / DAY), days, Math.floor((length % DAY) / HOUR), hours);
}
