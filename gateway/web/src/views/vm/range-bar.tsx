import type { ComponentChildren } from "preact";
import type { Schemas } from "../../api/client";
import { fullTime } from "../../format";
import { t } from "../../i18n";
import { Choice } from "../../parts/switches";
import { backToLive, type Range, type RangeName, RANGES, shift, show } from "./range";

interface RangeBarProps {
  range: Range;
  resolution: Schemas["Resolution"] | undefined;
  loading: boolean;
  children: ComponentChildren;
}

export function RangeBar({ range, resolution, loading, children }: RangeBarProps) {
  const texts = t().vm;
  const options = (Object.keys(RANGES) as RangeName[]).map((name) => [name, texts.ranges[name]] as const);
  const whole = Math.abs(range.to - range.from - RANGES[range.name]) < 1000;
  return (
    <div class="range-bar">
      <Choice<RangeName | ""> label={texts.range} options={options} value={whole ? range.name : ""} choose={(name) => name && show(name)} />
      <div class="pair">
        <button type="button" aria-label={texts.earlier} title={texts.earlier} onClick={() => shift(range, -0.5)}>←</button>
        <button type="button" aria-label={texts.later} title={texts.later} disabled={range.live} onClick={() => shift(range, 0.5)}>→</button>
      </div>
      {!range.live && <button type="button" class="primary" onClick={backToLive}>{texts.backToLive}</button>}
      {children}
      <span class="faint between" aria-busy={loading}>
        {!range.live && texts.zoomed(fullTime(range.from), fullTime(range.to))}{" "}
        {resolution && texts.resolution[resolution]}
      </span>
      <span class="hint faint">{texts.hint}</span>
    </div>
  );
}
