//! Dialog that downloads the stored samples of a VM in the time range of the charts, page by page.
import { useEffect, useRef, useState } from "preact/hooks";
import { api, ask, type Schemas } from "../../api/client";
import { READ_TIMEOUT_MS } from "../../api/resource";
import { visible } from "../../format";
import { t } from "../../i18n";
import { FormDialog } from "../../parts/dialog";
import { route } from "../../router";
import type { Range } from "./range";

/** Maximum size of a file, because the browser may keep it in memory. */
const MAX_BYTES = 256 * 1024 * 1024;
const MIB = 1024 * 1024;

type Kind = Schemas["RowKind"];
/** The part of a file's name that says what is in it. */
const NAMES: Record<Kind, string> = { vm: "vm", process: "processes", filesystem: "filesystems", hypervisor: "hypervisor" };
const KINDS = ["vm", "process", "filesystem", "hypervisor"] as const;

type Format = "csv" | "json_lines";
const EXTENSIONS: Record<Format, string> = { csv: "csv", json_lines: "jsonl" };

export function Download({ id, name, range }: { id: string; name: string; range: Range }) {
  const [open, setOpen] = useState(false);
  const texts = t().download;
  return (
    <>
      <button type="button" onClick={() => setOpen(true)}>{texts.open}</button>
      {open && <DownloadDialog id={id} name={name} range={range} close={() => setOpen(false)} />}
    </>
  );
}

function DownloadDialog({ id, name, range, close }: { id: string; name: string; range: Range; close: () => void }) {
  const texts = t().download;
  const [bytes, setBytes] = useState<number | null>(null);
  const stop = useRef(new AbortController());
  useEffect(() => () => stop.current.abort(), []);
  const process = route.value.query.get("process");
  // A live range moves with the clock; the file has the range at which the dialog was opened.
  const [{ from, to }] = useState({ from: new Date(range.from).toISOString(), to: new Date(range.to).toISOString() });

  const act = async (form: FormData) => {
    const what = form.get("what");
    const format: Format = form.get("format") === "csv" ? "csv" : "json_lines";
    const query = {
      from, to, format,
      kind: KINDS.find((kind) => kind === what) ?? "process",
      ...(what === "name" && process !== null && { name: process }),
    };
    const parts: Blob[] = [];
    let size = 0;
    for (let cursor: string | null | undefined; cursor !== null;) {
      const page = await pageOf(id, { ...query, ...(cursor !== undefined && { cursor }) }, stop.current.signal);
      size += page.text.size;
      if (size > MAX_BYTES) throw new Error(texts.tooLarge(MAX_BYTES / MIB));
      parts.push(page.text);
      setBytes(size);
      cursor = page.next;
    }
    save(new Blob(parts), `${name}-${NAMES[query.kind]}-${from.slice(0, 10)}.${EXTENSIONS[format]}`);
  };

  return (
    <FormDialog title={texts.title(name)} submit={texts.submit} act={act} close={close}>
      <label>
        {texts.what}
        <select name="what">
          <option value="vm">{texts.vm}</option>
          <option value="process">{texts.processes}</option>
          <option value="filesystem">{texts.filesystems}</option>
          <option value="hypervisor">{texts.hypervisor}</option>
          {process !== null && <option value="name" selected>{texts.named(visible(process))}</option>}
        </select>
      </label>
      <label>
        {texts.format}
        <select name="format">
          <option value="csv">CSV</option>
          <option value="json_lines">JSON Lines</option>
        </select>
      </label>
      <p class="faint small">{texts.hint}</p>
      {bytes !== null && <p role="status">{texts.progress((bytes / MIB).toFixed(1))}</p>}
    </FormDialog>
  );
}

interface Query {
  kind: Kind;
  from: string;
  to: string;
  format: Format;
  name?: string;
  cursor?: string;
}

async function pageOf(id: string, query: Query, stop: AbortSignal): Promise<{ text: Blob; next: string | null }> {
  const signal = AbortSignal.any([stop, AbortSignal.timeout(READ_TIMEOUT_MS)]);
  const params = { path: { instance_id: id }, query };
  const call = api.GET("/api/v1/vms/{instance_id}/rows", { params, signal, parseAs: "blob" });
  const text = await ask(call);
  return { text, next: (await call).response.headers.get("x-next-cursor") };
}

/** Saves a file as the browser does with downloads. */
function save(file: Blob, name: string): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(file);
  link.download = name;
  link.click();
  // The browser has read the address when the click returns, but not yet the file.
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
