//! View that lists the signed-in user's sessions and can end them.
import { useState } from "preact/hooks";
import { api, ask, type Schemas, signOut } from "../api/client";
import { useEvery, useResource } from "../api/resource";
import { now } from "../clock";
import { ago, fullTime, ms, SECOND, shortTime } from "../format";
import { t } from "../i18n";
import { Badge } from "../parts/badge";
import { FormDialog } from "../parts/dialog";
import { Failed, Loading } from "../parts/states";

type Session = Schemas["OwnSession"];

/** Reload interval; the time of the last use is accurate to about a minute. */
const RELOAD_MS = 30 * SECOND;

export function Sessions() {
  const texts = t().sessions;
  const [ending, setEnding] = useState<Session | null>(null);
  const sessions = useResource(async (signal) => {
    const { sessions } = await ask(api.GET("/api/v1/sessions", { signal }));
    return [...sessions.filter((session) => session.current), ...sessions.filter((session) => !session.current)];
  }, []);
  useEvery(RELOAD_MS, sessions.reload);
  const close = () => {
    setEnding(null);
    sessions.reload();
  };
  return (
    <>
      <div class="heading"><h1 tabIndex={-1}>{texts.title}</h1></div>
      <p class="lead faint">{texts.hint}</p>
      {sessions.data ? (
        <SessionTable sessions={sessions.data} end={setEnding} />
      ) : sessions.failure ? (
        <Failed failure={sessions.failure} retry={sessions.reload} />
      ) : (
        <Loading rows={3} />
      )}
      {ending && <EndDialog session={ending} close={close} />}
    </>
  );
}

function SessionTable({ sessions, end }: { sessions: Session[]; end: (session: Session) => void }) {
  const { columns } = t().sessions;
  return (
    <table class="sessions">
      <thead>
        <tr>
          <th scope="col">{columns.source}</th>
          <th scope="col">{columns.began}</th>
          <th scope="col">{columns.used}</th>
          <th scope="col" class="idle">{columns.idle}</th>
          <th scope="col" class="expires">{columns.expires}</th>
          <th scope="col"><span class="hidden">{columns.action}</span></th>
        </tr>
      </thead>
      <tbody>
        {sessions.map((session) => <SessionRow key={session.id} session={session} end={() => end(session)} />)}
      </tbody>
    </table>
  );
}

function SessionRow({ session, end }: { session: Session; end: () => void }) {
  const texts = t().sessions;
  const source = session.source ?? texts.unknownSource;
  const began = shortTime(ms(session.began_at));
  return (
    <tr data-session={session.id}>
      <th scope="row">
        {source}
        {session.current && <Badge tone="good">{texts.current}</Badge>}
      </th>
      <td data-label={texts.columns.began} title={fullTime(ms(session.began_at))}>{began}</td>
      <td data-label={texts.columns.used} title={fullTime(ms(session.last_used_at))}>
        {session.current ? texts.now : ago(ms(session.last_used_at), now.value)}
      </td>
      <td data-label={texts.columns.idle} class="idle">{shortTime(ms(session.idle_ends_at))}</td>
      <td data-label={texts.columns.expires} class="expires">{shortTime(ms(session.expires_at))}</td>
      <td class="act">
        {session.current ? (
          <button type="button" onClick={() => void signOut()}>{t().settings.signOut}</button>
        ) : (
          <button type="button" aria-label={texts.endOf(source, began)} onClick={end}>{texts.end}</button>
        )}
      </td>
    </tr>
  );
}

function EndDialog({ session, close }: { session: Session; close: () => void }) {
  const texts = t().sessions;
  const act = async () => {
    await ask(api.DELETE("/api/v1/sessions/{session_id}", { params: { path: { session_id: session.id } } }));
  };
  const source = session.source ?? texts.unknownSource;
  return (
    <FormDialog title={texts.endTitle} submit={texts.end} dangerous act={act} close={close}>
      <p>{texts.endText(source, shortTime(ms(session.began_at)))}</p>
    </FormDialog>
  );
}
