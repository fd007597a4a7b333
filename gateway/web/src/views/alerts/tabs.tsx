import { may } from "../../api/client";
import { t } from "../../i18n";
import { route } from "../../router";

/** Links between the views about alerts. */
export function Tabs() {
  const texts = t().alerts.tabs;
  const path = route.value.path;
  const links = [
    ["/alerts", texts.alerts],
    ["/alerts/rules", texts.rules],
    ["/alerts/silences", texts.silences],
    ...(may("admin") ? ([["/alerts/channels", texts.channels], ["/alerts/messages", texts.messages]] as const) : []),
  ] as const;
  return (
    <nav class="tabs" aria-label={texts.label}>
      {links.map(([address, text]) => (
        <a key={address} href={address} aria-current={path === address ? "page" : undefined}>{text}</a>
      ))}
    </nav>
  );
}
