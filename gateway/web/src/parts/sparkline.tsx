import { percent } from "../format";
import { t } from "../i18n";

const WIDTH = 120;
const HEIGHT = 28;

/** CPU over the last hour on a scale of 0 to 100%, with gaps where samples are missing. */
export function Sparkline({ values }: { values: (number | null)[] }) {
  const known = values.filter((value) => value !== null);
  if (known.length === 0) return null;
  const peak = Math.max(...known);
  const x = (index: number) => (index * WIDTH) / Math.max(1, values.length - 1);
  const y = (value: number) => HEIGHT - 1.5 - (Math.min(100, value) / 100) * (HEIGHT - 3);
  let path = "";
  let before = false;
  values.forEach((value, index) => {
    if (value !== null) path += `${before ? "L" : "M"}${x(index).toFixed(1)} ${y(value).toFixed(1)}${before ? "" : "h.01"}`;
    before = value !== null;
  });
  return (
    <svg
      class="sparkline" viewBox={`0 0 ${WIDTH} ${HEIGHT}`} preserveAspectRatio="none" role="img"
      aria-label={t().vms.sparkline(percent(peak))}
    >
      <path d={path} vector-effect="non-scaling-stroke" />
    </svg>
  );
}
