//! View of one VM: charts, and below them the processes at the moment under the mouse pointer.
import { useSignal } from "@preact/signals";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { api, ask, type Schemas, type Vm } from "../../api/client";
import { onEvent, watch } from "../../api/live";
import { useEvery, useResource } from "../../api/resource";
import { now } from "../../clock";
import { t } from "../../i18n";
import { DegradedNote, Failed, Loading, Notice } from "../../parts/states";
import { route } from "../../router";
import { FaultNotes } from "../agent-faults";
import { ConflictNote } from "./actions";
import { AlertNotes, PastAlerts, useVmAlerts } from "./alerts";
import { Changes } from "./changes";
import { Charts } from "./charts";
import { compareRange } from "./compared";
import { Download } from "./download";
import { Filesystems } from "./filesystems";
import { Header } from "./header";
import { MarkList, useVmMarks } from "./marks";
import { ProcessHistory } from "./process-history";
import { ProcessTable } from "./process-table";
import { pin, type Range, RANGES, unpin, useRange } from "./range";
import { RangeBar } from "./range-bar";
import { type Bucket, bySource, columns, VM_MEASURES, type VmMeasure, withSample } from "./series";

/** Reload interval for data that live events do not carry. */
const REFRESH_MS = 60_000;
const NO_COLUMNS = columns<VmMeasure>([], 0, VM_MEASURES);
/** Chart width per bucket. */
const PIXELS_PER_POINT = 3;

export function points(): number {
  const width = innerWidth > 900 ? innerWidth / 2 : innerWidth;
  return Math.max(100, Math.min(600, Math.round(width / PIXELS_PER_POINT)));
}

export function VmPage({ id }: { id: string }) {
  const vm = useVm(id);
  const range = useRange();
  const history = useHistory(id, range, "agent");
  const measured = useHistory(id, range, "hypervisor");
  const alerts = useVmAlerts(id, range);
  const marks = useVmMarks(id, range);
  const hover = useSignal<number | null>(null);
  // A live chart moves with the clock; the requested time range stays fixed until the next request.
  const shown = range.live ? { ...range, from: now.value - RANGES[range.name], to: now.value } : range;
  const values = useMemo(
    () => bySource(history.columns ?? NO_COLUMNS, measured.columns ?? NO_COLUMNS),
    [history.columns, measured.columns],
  );
  const stepMs = Math.max(history.columns?.stepMs ?? 0, measured.columns?.stepMs ?? 0);
  useEffect(() => {
    const key = (event: KeyboardEvent) => {
      if (event.key === "Escape" && route.peek().query.has("at") && !document.querySelector("dialog[open]")) unpin();
    };
    addEventListener("keydown", key);
    return () => removeEventListener("keydown", key);
  }, []);
  if (vm.failure && (!vm.data || vm.failure.status === 404)) {
    if (vm.failure.status !== 404) return <Failed failure={vm.failure} retry={vm.reload} />;
    const texts = t().vm;
    return (
      <Notice title={texts.notFoundTitle} whole>
        <p>{texts.notFound}</p>
        <a class="button" href="/">{texts.back}</a>
      </Notice>
    );
  }
  if (!vm.data) return <Loading />;
  // For a point of the chart, show the processes at the end of its time bucket, because each sample covers the interval
  // before it.
  const moment = (at: number) => Math.min(at + stepMs, Date.now());
  const selected = { hover, moment, pinned: range.pin, live: range.live, to: range.to };
  const isLoaded = (history.columns ?? history.failure) && (measured.columns ?? measured.failure);
  const failure = history.failure ?? measured.failure;
  return (
    <>
      <Header vm={vm.data} />
      <DegradedNote degraded={vm.data.degraded} />
      {range.isUnreadable && <div class="banner warn" role="status">{t().vm.noMoment}</div>}
      <ConflictNote copies={vm.data.copies} />
      <FaultNotes faults={vm.data.agent_faults} />
      <AlertNotes id={id} alerts={alerts} />
      <RangeBar range={shown} resolution={history.resolution} loading={history.loading || measured.loading}>
        <button type="button" onClick={() => compareRange(shown)}>{t().changes.open}</button>
        <Download id={id} name={vm.data.name ?? id} range={shown} />
      </RangeBar>
      {!isLoaded ? (
        <Loading rows={4} />
      ) : values.at.length > 0 ? (
        <>
          <Charts values={values} range={shown} marks={alerts.marks} moments={marks.moments} hover={hover} click={(at) => pin(shown, moment(at))} />
          <PastAlerts alerts={alerts} />
          <MarkList marks={marks} range={shown} />
        </>
      ) : failure ? (
        <Failed failure={failure} retry={() => [history, measured].forEach(({ reload }) => reload())} />
      ) : (
        <NoSamples vm={vm.data} />
      )}
      <ProcessHistory id={id} range={shown} chosen={range} hover={hover} click={(at) => pin(shown, moment(at))} />
      <Changes id={id} pinned={range.pin} />
      <Filesystems id={id} {...selected} />
      <ProcessTable id={id} restricted={vm.data.sample?.restricted ?? null} {...selected} />
    </>
  );
}

function NoSamples({ vm }: { vm: Vm }) {
  const texts = t().vm;
  return (
    <Notice title={texts.noSamplesTitle}><p>{vm.agent === "never" ? texts.noAgent : texts.noSamples}</p></Notice>
  );
}

function useVm(id: string) {
  const vm = useResource(
    (signal) => ask(api.GET("/api/v1/vms/{instance_id}", { params: { path: { instance_id: id } }, signal })),
    [id],
  );
  const [changes, setChanges] = useState<Partial<Vm>>({});
  const isDisputed = useRef(false);
  isDisputed.current = (vm.data?.copies.length ?? 0) > 0;
  useEffect(() => setChanges({}), [vm.data]);
  useEffect(() => {
    watch([id]);
    return () => watch([]);
  }, [id]);
  useEffect(() => {
    const change = (more: Partial<Vm>) => setChanges((before) => ({ ...before, ...more }));
    const stops = [
      onEvent("sample", ({ instance_id, ...sample }) => {
        if (instance_id === id) change({ sample, agent: "reporting", last_report_at: new Date().toISOString() });
      }),
      onEvent("hypervisor_sample", ({ instance_id, ...sample }) => {
        if (instance_id === id) change({ hypervisor_sample: { ...sample, restricted: null } });
      }),
      onEvent("machine", ({ instance_id, state }) => {
        if (instance_id !== id) return;
        // The event may be of another hypervisor than the one whose state is shown.
        if (!isDisputed.current) change({ state });
        vm.reload();
      }),
      onEvent("operation", ({ instance_id, machine_state }) => {
        if (instance_id === id && machine_state && !isDisputed.current) change({ state: machine_state });
      }),
      onEvent("removed", ({ instance_id }) => {
        if (instance_id === id) vm.reload();
      }),
    ];
    return () => stops.forEach((stop) => stop());
  }, [id]);
  useEvery(REFRESH_MS, vm.reload);
  return { ...vm, data: vm.data && { ...vm.data, ...changes } };
}

/** The history that one source measured of a VM. */
function useHistory(id: string, range: Range, source: Schemas["Source"]) {
  const key = `${range.name} ${range.live ? "live" : `${range.from} ${range.to}`}`;
  const series = useResource(
    (signal) => {
      const to = range.live ? Date.now() : range.to;
      const from = range.live ? to - RANGES[range.name] : range.from;
      const query = { source, from: new Date(from).toISOString(), to: new Date(to).toISOString(), points: points() };
      const params = { path: { instance_id: id }, query };
      return ask(api.GET("/api/v1/vms/{instance_id}/samples", { params, signal, headers: { Accept: "application/json" } }));
    },
    [id, key],
  );
  useEvery(REFRESH_MS, () => range.live && series.reload());
  const [buckets, setBuckets] = useState<Bucket<VmMeasure>[] | undefined>(undefined);
  // This view requests JSON. The OpenAPI document also allows CSV, which would be a string.
  const read = typeof series.data === "string" ? undefined : series.data;
  useEffect(() => setBuckets(read?.buckets), [read]);
  const reload = useRef(series.reload);
  useEffect(() => {
    if (!range.live || !read) return;
    return onEvent(source === "agent" ? "sample" : "hypervisor_sample", (sample) => {
      if (sample.instance_id !== id) return;
      if (read.step_ms === 0) reload.current();
      else setBuckets((all) => all && withSample(all, read.step_ms, sample, Date.now() - RANGES[range.name]));
    });
  }, [id, key, read]);
  const shown = useMemo(
    () => buckets && read && columns(buckets, read.step_ms, VM_MEASURES),
    [buckets, read],
  );
  return { columns: shown, resolution: read?.resolution, loading: series.loading, failure: series.failure, reload: series.reload };
}
