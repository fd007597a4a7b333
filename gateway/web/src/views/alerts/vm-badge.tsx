import { firingByVm } from "../../alerts";
import { t } from "../../i18n";
import { Badge } from "../../parts/badge";
import { SEVERITY } from "./card";
import { conditionText, valueText } from "./texts";

/** The firing alerts of a VM, for its row in the list; null without any. */
export function FiringBadge({ id }: { id: string }) {
  const alerts = firingByVm.value.get(id) ?? [];
  const [first] = alerts;
  if (!first) return null;
  const texts = t().alerts.vms;
  const title = alerts.map(({ rule_name, condition, subject, value }) => {
    const known = [subject, valueText(condition, value) ?? conditionText(condition)].filter(Boolean).join(" ");
    return t().common.labelled(rule_name, known);
  });
  return (
    <Badge tone={SEVERITY[first.severity] ?? "bad"} title={title.join("\n")}>
      {alerts.length === 1 ? first.rule_name : texts.badge(alerts.length)}
    </Badge>
  );
}
