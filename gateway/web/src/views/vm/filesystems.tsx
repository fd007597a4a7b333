//! Shows the filesystems of a moment, the fullest first.
import { useEffect, useState } from "preact/hooks";
import { api, ask, type Schemas } from "../../api/client";
import { onEvent } from "../../api/live";
import { useResource } from "../../api/resource";
import { bytes, ms, shortTime, visible } from "../../format";
import { t } from "../../i18n";
import { Meter } from "../../parts/meter";
import { Failed, Loading } from "../../parts/states";
import { type Moment, useMoment } from "./moment";

type Filesystem = Schemas["Filesystem"];

/** Number of filesystems shown at first: one row of a wide screen. */
const INITIAL = 4;
/** Percentage from which a filesystem is highlighted as nearly full. */
const NEARLY_FULL = 90;

const share = ({ used_bytes: used, total_bytes: total }: Filesystem): number => (total > 0 ? (100 * used) / total : 0);

export function Filesystems({ id, ...moment }: { id: string } & Moment) {
  const texts = t().filesystems;
  const at = useMoment(moment);
  const read = useFilesystems(id, at);
  const [all, setAll] = useState(false);
  const sorted = [...(read.data?.filesystems ?? [])].sort((one, other) => share(other) - share(one));
  const shown = all ? sorted : sorted.slice(0, INITIAL);
  return (
    <section class="filesystems" aria-label={texts.title} aria-busy={read.loading}>
      <div class="heading">
        <h2>{texts.title}</h2>
        {read.data?.at && <span class="moment">{shortTime(ms(read.data.at))}</span>}
        {sorted.length > INITIAL && (
          <button type="button" aria-expanded={all} onClick={() => setAll(!all)}>
            {all ? texts.showFullest(INITIAL) : texts.showAll(sorted.length)}
          </button>
        )}
      </div>
      {!read.data ? (
        read.failure ? <Failed failure={read.failure} retry={read.reload} /> : <Loading rows={1} />
      ) : shown.length === 0 ? (
        <p class="faint none">{texts.empty}</p>
      ) : (
        <ul class="mounts" tabIndex={0} aria-label={texts.title}>
          {shown.map((filesystem) => <Mount key={filesystem.mount_point} filesystem={filesystem} />)}
        </ul>
      )}
    </section>
  );
}

function Mount({ filesystem }: { filesystem: Filesystem }) {
  const name = visible(filesystem.mount_point);
  return (
    <li>
      <p class="name"><b title={name}>{name}</b> <span class="faint" title={visible(filesystem.filesystem)}>{visible(filesystem.filesystem)}</span></p>
      <Meter value={share(filesystem)} hot={NEARLY_FULL} />
      <p class="faint small">{t().filesystems.used(bytes(filesystem.used_bytes), bytes(filesystem.total_bytes))}</p>
    </li>
  );
}

/** The filesystems at the moment, or now if it is null. Agents sample them together with processes. */
function useFilesystems(id: string, at: number | null) {
  const filesystems = useResource((signal) => {
    const query = at === null ? {} : { at: new Date(at).toISOString() };
    return ask(api.GET("/api/v1/vms/{instance_id}/filesystems", { params: { path: { instance_id: id }, query }, signal }));
  }, [id, at]);
  useEffect(() => {
    if (at !== null) return;
    return onEvent("processes", (event) => event.instance_id === id && filesystems.reload());
  }, [id, at]);
  return filesystems;
}
