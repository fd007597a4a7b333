import { useEffect } from "preact/hooks";
import { firing, useFiring } from "./alerts";
import { api, ask, may, me } from "./api/client";
import { followLive, liveState } from "./api/live";
import { useResource } from "./api/resource";
import { whole } from "./format";
import { t } from "./i18n";
import { followOperations } from "./operations";
import { AccountMenu } from "./parts/account";
import { Failed, Loading, NotFound } from "./parts/states";
import { route } from "./router";
import { Agents } from "./views/agents";
import { AlertViews } from "./views/alerts";
import { Audit } from "./views/audit";
import { Operations } from "./views/operations";
import { ProcessSearch } from "./views/search";
import { Sessions } from "./views/sessions";
import { Logo, SignIn } from "./views/sign-in";
import { StatusView } from "./views/status";
import { Tokens } from "./views/tokens";
import { Users } from "./views/users";
import { VmPage } from "./views/vm/page";
import { Vms } from "./views/vms";

export function App() {
  const session = useResource(async (signal) => {
    try {
      me.value = await ask(api.GET("/api/v1/me", { signal }));
    } catch (error) {
      // Nobody is signed in: show the sign-in form instead of an error.
      if (me.value !== null) throw error;
    }
    return true;
  }, []);
  if (me.value) return <Shell key={me.value.user_name} />;
  if (me.value === null) return <SignIn />;
  return <main>{session.failure ? <Failed failure={session.failure} retry={session.reload} /> : <Loading />}</main>;
}

function Shell() {
  useEffect(followLive, []);
  useEffect(followOperations, []);
  useFiring();
  return (
    <>
      <a class="skip" href="#main">{t().skip}</a>
      <header class="top">
        <a class="brand" href="/"><Logo /><span>{t().product}</span></a>
        <Navigation />
        <LiveMark />
        <AccountMenu />
      </header>
      {liveState.value === "lost" && (
        <div class="banner bad" role="alert"><strong>{t().live.lostTitle}</strong> {t().live.lostMore}</div>
      )}
      <main id="main"><View /></main>
    </>
  );
}

function Navigation() {
  const texts = t().nav;
  const path = route.value.path;
  const links = [
    ["/", texts.vms, path === "/" || path.startsWith("/vms")],
    ["/alerts", texts.alerts, isAlerts(path)],
    ["/processes", texts.processes, path === "/processes"],
    ["/operations", texts.operations, path === "/operations"],
    ...(may("admin")
      ? ([
          ["/agents", texts.agents, path === "/agents"],
          ["/audit", texts.audit, path === "/audit"],
          ["/users", texts.users, path === "/users"],
          ["/status", texts.status, path === "/status"],
        ] as const)
      : []),
  ] as const;
  return (
    <nav aria-label={texts.label}>
      {links.map(([address, text, here]) => (
        <a key={address} href={address} aria-current={here ? "page" : undefined}>
          {text}
          {address === "/alerts" && <FiringCount />}
        </a>
      ))}
    </nav>
  );
}

const isAlerts = (path: string): boolean => path === "/alerts" || path.startsWith("/alerts/");

/** Number of firing alerts, if there are any. */
function FiringCount() {
  const count = firing.value?.alerts.size ?? 0;
  if (count === 0) return null;
  const text = firing.value?.isCut ? `${whole(count)}+` : whole(count);
  return (
    <span class="firing-count" title={t().alerts.firingCount(text)}>
      <span aria-hidden="true">{text}</span>
      <span class="hidden">{t().alerts.firingCount(text)}</span>
    </span>
  );
}

function LiveMark() {
  return <span class={`live ${liveState.value}`} role="status">{t().live[liveState.value]}</span>;
}

function View() {
  const { path } = route.value;
  const vm = /^\/vms\/([0-9A-Za-z_-]{1,64})$/.exec(path)?.[1];
  if (path === "/") return <Vms />;
  if (vm !== undefined) return <VmPage key={vm} id={vm} />;
  if (isAlerts(path)) return <AlertViews path={path} />;
  if (path === "/processes") return <ProcessSearch />;
  if (path === "/operations") return <Operations />;
  if (path === "/agents") return <Agents />;
  if (path === "/audit") return <Audit />;
  if (path === "/users") return <Users />;
  if (path === "/status") return <StatusView />;
  if (path === "/sessions") return <Sessions />;
  if (path === "/tokens") return <Tokens />;
  return <NotFound />;
}
