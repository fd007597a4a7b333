//! The views about alerts, by their address.
import { may } from "../../api/client";
import { t } from "../../i18n";
import { NotFound, Notice } from "../../parts/states";
import { Channels } from "./channels";
import { Alerts, OneAlert } from "./list";
import { Messages } from "./messages";
import { EditRule, NewRule } from "./rule-editor";
import { Rules } from "./rules";
import { Silences } from "./silences";

export function AlertViews({ path }: { path: string }) {
  if (path === "/alerts") return <Alerts />;
  if (path === "/alerts/rules") return <Rules />;
  if (path === "/alerts/rules/new") return <NewRule />;
  if (path === "/alerts/silences") return <Silences />;
  if (path === "/alerts/channels") return may("admin") ? <Channels /> : <Forbidden />;
  if (path === "/alerts/messages") return may("admin") ? <Messages /> : <Forbidden />;
  const [, kind, id] = /^\/alerts\/(rules\/)?([0-9a-f]{32})$/.exec(path) ?? [];
  if (id === undefined) return <NotFound />;
  return kind ? <EditRule key={id} id={id} /> : <OneAlert key={id} id={id} />;
}

function Forbidden() {
  const texts = t().common;
  return <Notice title={texts.forbiddenTitle} kind="forbidden" whole><p>{texts.forbidden}</p></Notice>;
}
