//! The processes that explain an alert: the first one in a line, all of them in a table.
import { type Alert, type Schemas } from "../../api/client";
import { momentAddress } from "../../alerts";
import { bytes, ms, percent, shortTime, tenths, visible, wholePercent } from "../../format";
import { t } from "../../i18n";
import { Badge } from "../../parts/badge";
import { actionText } from "./texts";

type Culprits = Schemas["Culprits"];
type Culprit = Culprits["processes"][number];

/** A process without name or pid is a sum of several. */
const isSum = ({ kind }: Culprit) => kind === "sum";

/** The process that explains most of the alert, or what else is known, in one line. */
export function FirstCulprit({ alert }: { alert: Alert }) {
  const texts = t().alerts.culprits;
  const { culprits } = alert;
  if (!culprits) {
    return alert.state === "firing" && alert.instance_id !== null ? <span class="faint">{texts.looking}</span> : <span class="faint">{t().alerts.details}</span>;
  }
  const [first] = culprits.processes;
  if (first) return <Line culprit={first} />;
  if (culprits.operation) return <span>{operationText(culprits.operation)}</span>;
  return <span class="faint">{culprits.problem ?? (alert.instance_id === null ? t().alerts.details : texts.none)}</span>;
}

function Line({ culprit }: { culprit: Culprit }) {
  const texts = t().alerts.culprits;
  const { share, name, pid, user, container, unit, started_at, processes, exit_code } = culprit;
  const facts = [
    isSum(culprit) ? texts.sum(processes) : pid !== null && texts.pid(pid),
    user !== null && texts.user(visible(user)),
    container ?? unit,
    started_at !== null && texts.started(shortTime(ms(started_at))),
    exit_code !== null && texts.exit(exit_code),
  ];
  return (
    <>
      {share !== null && <b class="share">{wholePercent(100 * share)}</b>}
      <b class="mono">{visible(name)}</b>
      <span class="faint">{facts.filter((fact) => typeof fact === "string").map(visible).join(" · ")}</span>
    </>
  );
}

const operationText = ({ action, user }: Schemas["EndedBy"]): string => t().alerts.lastOperation(actionText(action), user);

/** All processes that explain the alert. */
export function CulpritTable({ alert }: { alert: Alert }) {
  const texts = t().alerts.culprits;
  const { culprits } = alert;
  if (!culprits) return null;
  const { processes, operation, problem, last_known } = culprits;
  return (
    <>
      {operation && <p>{operationText(operation)}</p>}
      {problem && <p class="problem">{problem}</p>}
      {processes.length > 0 && (
        <table class="culprits">
          <caption>{last_known ? texts.lastKnown : texts.title}</caption>
          <thead>
            <tr>
              <th scope="col" class="number share">{texts.columns.share}</th>
              <th scope="col" class="name">{texts.columns.name}</th>
              <th scope="col" class="number pid">{texts.columns.pid}</th>
              <th scope="col" class="user">{texts.columns.user}</th>
              <th scope="col" class="unit">{texts.columns.unit}</th>
              <th scope="col" class="started">{texts.columns.started}</th>
              <th scope="col" class="number amount">{texts.columns.amount}</th>
            </tr>
          </thead>
          <tbody>{processes.map((process) => <Row key={`${process.name} ${process.pid} ${process.user}`} alert={alert} culprit={process} />)}</tbody>
        </table>
      )}
    </>
  );
}

function Row({ alert, culprit }: { alert: Alert; culprit: Culprit }) {
  const texts = t().alerts.culprits;
  const { share, name, pid, user, container, unit, started_at, ended_at, exit_code, command_line } = culprit;
  const none = <span class="faint">{t().common.none}</span>;
  const { instance_id } = alert;
  return (
    <tr>
      <td class="number share">
        {share === null ? none : (
          <span class="meter">
            <span class="bar" aria-hidden="true"><span style={{ width: `${Math.min(100, Math.max(0, 100 * share))}%` }} /></span>
            <b class="number">{wholePercent(100 * share)}</b>
          </span>
        )}
      </td>
      <th scope="row" class="name">
        {instance_id === null ? visible(name) : (
          <a href={momentAddress({ ...alert, instance_id }, { name, pid })} title={texts.historyOf(visible(name))}>{visible(name)}</a>
        )}
        {isSum(culprit) && <> <Badge tone="quiet">{texts.sum(culprit.processes)}</Badge></>}
        {ended_at !== null && <> <Badge tone="quiet">{texts.ended(shortTime(ms(ended_at)))}</Badge></>}
        {exit_code !== null && <> <Badge tone={exit_code === 0 ? "quiet" : "bad"}>{texts.exit(exit_code)}</Badge></>}
        {command_line !== null && <code class="command">{visible(command_line)}</code>}
      </th>
      <td class="number pid" data-label={texts.columns.pid}>{pid ?? none}</td>
      <td class="user" data-label={texts.columns.user}>{user === null ? none : visible(user)}</td>
      <td class="unit" data-label={texts.columns.unit}>{visible(container ?? unit ?? t().common.none)}</td>
      <td class="started" data-label={texts.columns.started}>{started_at === null ? none : shortTime(ms(started_at))}</td>
      <td class="number amount" data-label={texts.columns.amount}>{amountText(alert.culprits?.measure ?? "cpu", culprit.amount)}</td>
    </tr>
  );
}

function amountText(measure: Schemas["TopMeasure"], amount: number): string {
  const texts = t().alerts.culprits.amount;
  if (measure === "cpu") return texts.cpu(tenths(amount));
  return measure === "mem" ? texts.mem(percent(amount)) : texts.disk(bytes(1024 * amount));
}
