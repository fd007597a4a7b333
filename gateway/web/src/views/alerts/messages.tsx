//! View that lists the messages of channels and the attempts to deliver them, for administrators.
import { api, ask, type Schemas } from "../../api/client";
import { useEvery } from "../../api/resource";
import { now } from "../../clock";
import { duration, fullTime, ms, SECOND, shortTime, visible } from "../../format";
import { t, textOf } from "../../i18n";
import { Badge, toneOf, type Tone } from "../../parts/badge";
import { usePages } from "../../parts/pages";
import { Failed, Loading, Notice } from "../../parts/states";
import { route } from "../../router";
import { useChannelNames } from "./rules";
import { Tabs } from "./tabs";

type Message = Schemas["Message"];
type State = "delivered" | "waiting" | "retrying";

const PAGE = 50;
/** While a message waits, its progress is read at this interval. */
const WAITING_MS = 2 * SECOND;
const RELOAD_MS = 10 * SECOND;
const TONES: Record<State, Tone> = { delivered: "good", waiting: "busy", retrying: "warn" };

export function Messages() {
  const texts = t().alerts.messageList;
  const { query } = route.value;
  const [channel, alert] = [query.get("channel"), query.get("alert")];
  const names = useChannelNames();
  const pages = usePages(
    async (cursor: string | undefined, signal) => {
      const query = {
        limit: PAGE, ...(channel && { channel_id: channel }), ...(alert && { alert_id: alert }), ...(cursor !== undefined && { cursor }),
      };
      const { messages, next } = await ask(api.GET("/api/v1/alert-messages", { params: { query }, signal }));
      return { items: messages, next: next ?? undefined };
    },
    [channel, alert],
  );
  const waits = pages.items.some((message) => message.delivered_at === null);
  // Reading the first page again would drop further pages that the user has loaded.
  useEvery(waits ? WAITING_MS : RELOAD_MS, () => pages.items.length <= PAGE && pages.reload());
  const name = channel && names.get(channel)?.name;
  return (
    <>
      <div class="heading">
        {(channel || alert) && <a class="back" href="/alerts/channels" aria-label={texts.back} title={texts.back}>←</a>}
        <h1 tabIndex={-1}>{name ? texts.of(name) : alert ? texts.ofAlert : texts.title}</h1>
      </div>
      <Tabs />
      {!pages.loaded ? (
        pages.failure ? <Failed failure={pages.failure} retry={pages.reload} /> : <Loading />
      ) : pages.items.length === 0 ? (
        <Notice title={texts.emptyTitle}><p>{texts.empty}</p></Notice>
      ) : (
        <ul class="cards">
          {pages.items.map((message) => (
            <MessageCard key={message.id} message={message} channel={channel ? undefined : names.get(message.channel_id)?.name} />
          ))}
        </ul>
      )}
      {pages.next !== undefined && (
        <button type="button" class="more" disabled={pages.loading} onClick={pages.more}>{t().common.more}</button>
      )}
    </>
  );
}

function stateOf({ delivered_at, tries }: Message): State {
  if (delivered_at !== null) return "delivered";
  return tries > 0 ? "retrying" : "waiting";
}

function MessageCard({ message, channel }: { message: Message; channel: string | undefined }) {
  const texts = t().alerts.messageList;
  const { id, purpose, group, alerts, created_at, next_attempt_at, tries, attempts } = message;
  const state = stateOf(message);
  return (
    <li>
      <details class="operation message" data-message={id} data-state={state}>
        <summary>
          <Badge tone={toneOf(TONES, state)}>{texts.states[state]}</Badge>
          <strong>{textOf(texts.purposes, purpose)}</strong>
          <span>{[channel, ...Object.entries(group).map((pair) => pair.map(visible).join("="))].filter(Boolean).join(" · ")}</span>
          <span class="faint">{alerts.length > 0 && texts.alerts(alerts.length)}</span>
          <time class="faint" dateTime={created_at}>{shortTime(ms(created_at))}</time>
          <span class="faint took">{tries > 0 && texts.tries(tries)}</span>
        </summary>
        <ol class="steps">
          {attempts.map(({ at, took_ms, delivered, answer }) => (
            <li key={at}>
              <time class="faint" dateTime={at}>{fullTime(ms(at))}</time>
              <span class={delivered ? undefined : "problem"}>{delivered ? texts.delivered : texts.failed}</span>
              <span class="answer">{visible(answer)} <span class="faint">{texts.took(duration(took_ms))}</span></span>
            </li>
          ))}
          {attempts.length === 0 && <li><span class="faint whole">{texts.noAttempt}</span></li>}
          {next_attempt_at !== null && ms(next_attempt_at) > now.value && <li><span class="faint whole">{texts.next(fullTime(ms(next_attempt_at)))}</span></li>}
        </ol>
        <p class="faint small links">
          {alerts.map((alert) => <a key={`${alert.id} ${alert.state}`} href={`/alerts/${alert.id}`}>{texts.alert(textOf(t().alerts.state, alert.state))}</a>)}
          <span>{texts.id} <span class="mono">{id}</span></span>
        </p>
      </details>
    </li>
  );
}
