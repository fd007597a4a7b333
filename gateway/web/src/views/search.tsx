//! View that finds the VMs in which a process ran.
import { useEffect, useState } from "preact/hooks";
import { api, ask, type Schemas } from "../api/client";
import { now } from "../clock";
import { MINUTE, fullTime, ms, percent, shortTime, visible, whole } from "../format";
import { t } from "../i18n";
import { usePages } from "../parts/pages";
import { DegradedNote, Failed, Loading, Notice } from "../parts/states";
import { adjust, route, vmAddress } from "../router";
import { RANGES } from "./vm/range";

type Result = Schemas["ProcessSearchResult"];
type Found = Schemas["VmThatRan"];

const PERIODS = ["1h", "24h", "7d", "30d", "1y"] as const;
type Period = (typeof PERIODS)[number];
const MATCHES = ["exact", "prefix"] as const;
type Match = (typeof MATCHES)[number];
/** Maximum length of a name that the API accepts, in bytes; it has at most as many characters. */
const MAX_NAME = 256;
/** Minimum length of a prefix that the API accepts, in characters. */
const MIN_PREFIX = 3;
/** How far the answer may usually be behind. */
const USUAL_DELAY_MS = MINUTE;
/** Maximum number of VMs that are named as not searched. */
const MAX_NAMED = 5;

interface Search {
  name: string;
  match: Match;
  period: Period;
}

/** A later page has the time range of the first one. */
interface Cursor {
  cursor: string;
  from: string;
  to: string;
}

export function ProcessSearch() {
  const texts = t().search;
  const search = searchOf(route.value.query);
  const isTooShort = search.match === "prefix" && [...search.name].length < MIN_PREFIX;
  return (
    <>
      <div class="heading">
        <h1 tabIndex={-1}>{texts.title}</h1>
        <Form search={search} />
      </div>
      {search.name === "" ? (
        <Notice title={texts.startTitle}><p>{texts.start}</p></Notice>
      ) : isTooShort ? (
        <Notice title={texts.shortTitle}><p>{texts.short(MIN_PREFIX)}</p></Notice>
      ) : (
        <Results search={search} />
      )}
    </>
  );
}

function searchOf(query: URLSearchParams): Search {
  return {
    name: (query.get("name") ?? "").slice(0, MAX_NAME),
    match: MATCHES.find((known) => known === query.get("match")) ?? "exact",
    period: PERIODS.find((known) => known === query.get("range")) ?? "7d",
  };
}

function Form({ search }: { search: Search }) {
  const texts = t().search;
  const [name, setName] = useState(search.name);
  useEffect(() => setName(search.name), [search.name]);
  const send = (event: Event) => {
    event.preventDefault();
    adjust({ name: name || null });
  };
  const choose = (changes: Record<string, string>) => adjust({ name: name || null, ...changes });
  return (
    <form class="filters" role="search" onSubmit={send}>
      <input
        type="search" aria-label={texts.name} placeholder={texts.hint} value={name} maxLength={MAX_NAME}
        autocomplete="off" spellcheck={false} onInput={(event) => setName(event.currentTarget.value)}
      />
      <select aria-label={texts.match} value={search.match} onChange={(event) => choose({ match: event.currentTarget.value })}>
        {MATCHES.map((match) => <option key={match} value={match}>{texts.matches[match]}</option>)}
      </select>
      <select aria-label={t().vm.range} value={search.period} onChange={(event) => choose({ range: event.currentTarget.value })}>
        {PERIODS.map((period) => <option key={period} value={period}>{texts.last(t().vm.ranges[period])}</option>)}
      </select>
      <button type="submit" class="primary">{texts.submit}</button>
    </form>
  );
}

function Results({ search }: { search: Search }) {
  const texts = t().search;
  const { name, match, period } = search;
  const pages = usePages(
    async (cursor: Cursor | undefined, signal) => {
      const from = new Date(now.peek() - RANGES[period]).toISOString();
      const query = { name, match, from, ...cursor };
      const page = await ask(api.GET("/api/v1/processes", { params: { query }, signal }));
      const next = page.next === null ? undefined : { cursor: page.next, from: page.from, to: page.to };
      return { items: [page], next };
    },
    [name, match, period],
  );
  if (!pages.loaded) {
    return pages.failure ? <Failed failure={pages.failure} retry={pages.reload} /> : <Loading />;
  }
  const vms = pages.items.flatMap((page) => page.vms);
  const isComplete = pages.next === undefined;
  return (
    <div aria-busy={pages.loading}>
      <Incomplete pages={pages.items} />
      {vms.length > 0 && <p class="count" role="status">{texts.count(vms.length, isComplete)}</p>}
      {vms.length > 0 ? (
        <Vms vms={vms} />
      ) : isComplete ? (
        <Notice title={texts.emptyTitle}><p>{texts.empty}</p></Notice>
      ) : (
        <Notice title={texts.noneYetTitle}><p>{texts.noneYet}</p></Notice>
      )}
      {!isComplete && (
        <button type="button" class="more" disabled={pages.loading} onClick={pages.more}>{texts.more}</button>
      )}
    </div>
  );
}

/** Says which VMs or samples the answer may lack. */
function Incomplete({ pages }: { pages: Result[] }) {
  const texts = t().search;
  const first = pages[0];
  if (!first) return null;
  const completeTo = first.complete_to === null ? null : ms(first.complete_to);
  const lacks = completeTo === null
    ? texts.building
    : completeTo < Math.min(ms(first.to), now.value) - USUAL_DELAY_MS ? texts.behind(fullTime(completeTo)) : null;
  const unsearched = pages.flatMap((page) => page.unsearched);
  return (
    <>
      <DegradedNote degraded={first.degraded} />
      {lacks !== null && <div class="banner warn" role="status">{lacks}</div>}
      {unsearched.length > 0 && (
        <div class="banner warn" role="status">
          {texts.unsearched(unsearched.slice(0, MAX_NAMED).join(", "), unsearched.length - MAX_NAMED)}
        </div>
      )}
    </>
  );
}

function Vms({ vms }: { vms: Found[] }) {
  const texts = t().search.columns;
  return (
    <table class="found">
      <thead>
        <tr>
          <th scope="col" class="name">{texts.vm}</th>
          <th scope="col" class="processes">{texts.processes}</th>
          <th scope="col" class="first">{texts.first}</th>
          <th scope="col" class="last">{texts.last}</th>
          <th scope="col" class="number hours">{texts.hours}</th>
          <th scope="col" class="number most">{texts.most}</th>
          <th scope="col" class="number cpu">{texts.cpu}</th>
          <th scope="col" class="number mem">{texts.mem}</th>
        </tr>
      </thead>
      <tbody>{vms.map((vm) => <Row key={vm.instance_id} vm={vm} />)}</tbody>
    </table>
  );
}

function Row({ vm }: { vm: Found }) {
  const texts = t().search.columns;
  const [first, last] = [ms(vm.first_at), ms(vm.last_at)];
  return (
    <tr data-vm={vm.instance_id}>
      <th scope="row" class="name">
        <a href={momentAddress(vm)}>{vm.name ?? vm.instance_id}</a>
        {vm.name !== null && <span class="sub mono">{vm.instance_id}</span>}
      </th>
      <td class="processes mono">{vm.process_names.map(visible).join(", ")}</td>
      <td class="first" data-label={texts.first}><time dateTime={vm.first_at}>{shortTime(first)}</time></td>
      <td class="last" data-label={texts.last}><time dateTime={vm.last_at}>{shortTime(last)}</time></td>
      <td class="number hours" data-label={texts.hours}>{whole(vm.hours)}</td>
      <td class="number most" data-label={texts.most}>{whole(vm.max_processes)}</td>
      <td class="number cpu" data-label={texts.cpu}>{percent(vm.max_cpu_util)}</td>
      <td class="number mem" data-label={texts.mem}>{percent(vm.max_mem)}</td>
    </tr>
  );
}

/** The address of the VM's view at the moment at which the process was last seen. */
function momentAddress(vm: Found): string {
  const last = ms(vm.last_at);
  const text = (at: number) => new Date(at).toISOString();
  const query = new URLSearchParams({
    range: "1h",
    from: text(last - 50 * MINUTE),
    to: text(last + 10 * MINUTE),
    at: text(last),
  });
  const [name] = vm.process_names;
  if (name !== undefined) query.set("process", name);
  return `${vmAddress(vm.instance_id)}?${query.toString()}`;
}
