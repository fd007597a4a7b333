//! View of the state of vmwatch itself, for administrators.
import type { ComponentChildren } from "preact";
import { api, ask, type Schemas } from "../api/client";
import { useEvery, useResource } from "../api/resource";
import { bytes, duration, percent, SECOND, whole } from "../format";
import { t } from "../i18n";
import { Badge, type Tone } from "../parts/badge";
import { Failed, Loading } from "../parts/states";
import { vmAddress } from "../router";

type Status = Schemas["Status"];
type Part = keyof ReturnType<typeof t>["status"]["parts"];

const RELOAD_MS = 10 * SECOND;
/** Maximum number of ids of VMs that a line names. */
const MAX_NAMED = 5;

export function StatusView() {
  const texts = t().status;
  const status = useResource((signal) => ask(api.GET("/api/v1/status", { signal })), []);
  useEvery(RELOAD_MS, status.reload);
  return (
    <>
      <div class="heading"><h1 tabIndex={-1}>{texts.title}</h1></div>
      <p class="lead faint">{texts.hint}</p>
      {status.data && status.failure && <p class="banner warn" role="status">{texts.outdated}</p>}
      {status.data ? (
        <Parts status={status.data} />
      ) : status.failure ? (
        <Failed failure={status.failure} retry={status.reload} />
      ) : (
        <Loading rows={4} />
      )}
    </>
  );
}

function Parts({ status }: { status: Status }) {
  const { programs, samples, compaction, disk, agents, hypervisors, notices } = status;
  const texts = t().status;
  return (
    <div class="status">
      <Card part="programs" notices={notices} isKnown={programs !== null}>
        {programs?.map(({ name, replicas }) => (
          <Fact key={name} name={name}>{texts.replicas(replicas.length, versionsOf(replicas))}</Fact>
        ))}
      </Card>
      <Card part="samples" notices={notices} isKnown={samples !== null}>
        {samples && <Samples samples={samples} />}
      </Card>
      <Card part="compaction" notices={notices} unknown={texts.compaction.never} isKnown={compaction !== null}>
        {compaction && <Compaction compaction={compaction} />}
      </Card>
      <Card part="disk" notices={notices} unknown={texts.disk.isUnknown} isKnown={disk !== null}>
        {disk && <Disk disk={disk} />}
      </Card>
      <Card part="agents" notices={notices} isKnown={agents !== null}>
        {agents && <Agents agents={agents} />}
      </Card>
      <Card
        part="hypervisors" notices={notices} isKnown={hypervisors !== null && hypervisors.length > 0}
        unknown={hypervisors ? texts.noHypervisors : texts.unknown}
      >
        {hypervisors?.map((hypervisor) => <Hypervisor key={hypervisor.name} hypervisor={hypervisor} />)}
      </Card>
    </div>
  );
}

interface CardProps {
  part: Part;
  notices: Schemas["Notice"][];
  isKnown: boolean;
  /** The text if nothing is known and nothing is wrong. */
  unknown?: string;
  children?: ComponentChildren;
}

/** A part of the status with what needs attention. */
function Card({ part, notices, isKnown, unknown, children }: CardProps) {
  const texts = t().status;
  const own = notices.filter((notice) => notice.part === part);
  const level = own.some(({ kind }) => kind === "unavailable") ? "unavailable" : own.length > 0 ? "attention" : "good";
  const tones: Record<typeof level, Tone> = { good: "good", attention: "warn", unavailable: "bad" };
  return (
    <section data-part={part}>
      <h2>{texts.parts[part]} <Badge tone={tones[level]}>{texts.level[level]}</Badge></h2>
      {own.map(({ detail }) => <p key={detail} class="banner warn" lang="en">{detail}</p>)}
      {isKnown ? <dl>{children}</dl> : own.length === 0 && <p class="faint">{unknown ?? texts.unknown}</p>}
    </section>
  );
}

function Fact({ name, children }: { name: string; children: ComponentChildren }) {
  return <div><dt>{name}</dt><dd>{children}</dd></div>;
}

const versionsOf = (replicas: Schemas["ReplicaStatus"][]): string =>
  [...new Set(replicas.map(({ version }) => version))].join(", ");

function Samples({ samples }: { samples: Schemas["SampleBacklog"] }) {
  const { samples: texts, ofMost } = t().status;
  const { none } = t().common;
  return (
    <>
      <Fact name={texts.messages}>{whole(samples.messages)}</Fact>
      <Fact name={texts.size}>{ofMost(bytes(samples.bytes), bytes(samples.max_bytes))}</Fact>
      <Fact name={texts.oldest}>{samples.oldest_ms === null ? none : duration(samples.oldest_ms)}</Fact>
      <Fact name={texts.deadLetters}>{samples.dead_letters === null ? none : whole(samples.dead_letters)}</Fact>
    </>
  );
}

function Compaction({ compaction }: { compaction: Schemas["CompactionStatus"] }) {
  const texts = t().status.compaction;
  return (
    <>
      <Fact name={texts.lag}>{compaction.lag_ms === 0 ? texts.noLag : texts.ago(duration(compaction.lag_ms))}</Fact>
      <Fact name={texts.passed}>{texts.ago(duration(compaction.passed_ago_ms))}</Fact>
    </>
  );
}

function Disk({ disk }: { disk: Schemas["DatabaseDisk"] }) {
  const { disk: texts, ofMost } = t().status;
  const share = disk.size_bytes === 0 ? 0 : (100 * disk.used_bytes) / disk.size_bytes;
  const growth = disk.bytes_per_day;
  const left = disk.days_left === null ? texts.noLimit : whole(disk.days_left);
  return (
    <>
      <Fact name={texts.used}>{ofMost(bytes(disk.used_bytes), bytes(disk.size_bytes))} ({percent(share)})</Fact>
      <Fact name={texts.growth}>{growth === null ? texts.notYet : `${growth < 0 ? "−" : ""}${bytes(Math.abs(growth))}`}</Fact>
      <Fact name={texts.left}>{growth === null ? texts.notYet : left}</Fact>
    </>
  );
}

function Agents({ agents }: { agents: Schemas["AgentsStatus"] }) {
  const texts = t().status.agents;
  return (
    <>
      {(["reporting", "silent", "never"] as const).map((state) => (
        <Fact key={state} name={texts[state]}>{whole(agents[state])}</Fact>
      ))}
      {(["outdated", "over_limit", "wrong_clock", "other_faults"] as const).map((group) => (
        <Group key={group} name={texts[group]} group={agents[group]} />
      ))}
    </>
  );
}

/** The number of VMs, and links to the first of them. */
function Group({ name, group }: { name: string; group: Schemas["VmGroup"] }) {
  const named = group.vms.slice(0, MAX_NAMED);
  const more = group.count - named.length;
  return (
    <div>
      <dt>{name}</dt>
      <dd>{whole(group.count)}</dd>
      {group.count > 0 && (
        <dd class="vms">
          {named.map((id) => <a key={id} class="mono" href={vmAddress(id)}>{id}</a>)}
          {more > 0 && <span class="faint">{t().status.more(more)}</span>}
        </dd>
      )}
    </div>
  );
}

function Hypervisor({ hypervisor }: { hypervisor: Schemas["HypervisorStatus"] }) {
  const texts = t().status;
  const { name, listed_ago_ms: listed } = hypervisor;
  const state = !hypervisor.reachable ? "unreachable" : hypervisor.late ? "late" : "reachable";
  const tones: Record<typeof state, Tone> = { reachable: "good", late: "warn", unreachable: "bad" };
  return (
    <Fact name={name}>
      <Badge tone={tones[state]}>{texts.hypervisor[state]}</Badge>
      <span class="faint small"> {listed === null ? texts.neverListed : texts.listed(duration(listed))}</span>
    </Fact>
  );
}
