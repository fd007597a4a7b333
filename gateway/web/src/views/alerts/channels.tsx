//! View that lists the channels of alerts, for administrators.
import { useState } from "preact/hooks";
import { api, ask, type Schemas } from "../../api/client";
import { useEvery, useResource } from "../../api/resource";
import { fullTime, ms, SECOND, shortTime } from "../../format";
import { t, textOf } from "../../i18n";
import { Badge } from "../../parts/badge";
import { FormDialog, problemText } from "../../parts/dialog";
import { Failed, Loading, Notice } from "../../parts/states";
import { go } from "../../router";
import { ChannelDialog } from "./channel-dialog";
import { Tabs } from "./tabs";

type Channel = Schemas["Channel"];
type Open = { kind: "add" } | { kind: "edit" | "remove"; channel: Channel };

const RELOAD_MS = 10 * SECOND;

export function Channels() {
  const texts = t().alerts.channels;
  const [open, setOpen] = useState<Open | null>(null);
  const [problem, setProblem] = useState("");
  const read = useResource((signal) => ask(api.GET("/api/v1/alert-channels", { signal })), []);
  useEvery(RELOAD_MS, read.reload);
  const close = () => {
    setOpen(null);
    read.reload();
  };
  const test = async ({ id }: Channel) => {
    setProblem("");
    try {
      await ask(api.POST("/api/v1/alert-channels/{id}/test", { params: { path: { id } } }));
      // The messages show whether it was delivered, and the receiver's answer.
      go(`/alerts/messages?channel=${id}`);
    } catch (error) {
      setProblem(problemText(error));
    }
  };
  return (
    <>
      <div class="heading">
        <h1 tabIndex={-1}>{texts.title}</h1>
        {read.data && <button type="button" class="primary" onClick={() => setOpen({ kind: "add" })}>{texts.add}</button>}
      </div>
      <Tabs />
      <p class="lead faint">{texts.hint}</p>
      {read.data?.has_key === false && <p class="banner warn" role="status">{texts.noKey}</p>}
      {problem && <p class="problem" role="alert">{problem}</p>}
      {!read.data ? (
        read.failure ? <Failed failure={read.failure} retry={read.reload} /> : <Loading />
      ) : read.data.channels.length === 0 ? (
        <Notice title={texts.emptyTitle}><p>{texts.empty}</p></Notice>
      ) : (
        <ChannelTable channels={read.data.channels} open={setOpen} test={(channel) => void test(channel)} />
      )}
      {open?.kind === "add" && <ChannelDialog close={close} />}
      {open?.kind === "edit" && <ChannelDialog channel={open.channel} close={close} />}
      {open?.kind === "remove" && <RemoveDialog channel={open.channel} close={close} />}
    </>
  );
}

interface TableProps {
  channels: Channel[];
  open: (open: Open) => void;
  test: (channel: Channel) => void;
}

function ChannelTable({ channels, open, test }: TableProps) {
  const texts = t().alerts.channels;
  const { columns } = texts;
  return (
    <table class="listed channels">
      <thead>
        <tr>
          <th scope="col">{columns.name}</th>
          <th scope="col">{columns.kind}</th>
          <th scope="col">{columns.receiver}</th>
          <th scope="col">{columns.state}</th>
          <th scope="col">{columns.delivered}</th>
          <th scope="col"><span class="hidden">{columns.action}</span></th>
        </tr>
      </thead>
      <tbody>
        {channels.map((channel) => {
          const { id, spec, delivered_at, problem } = channel;
          return (
            <tr key={id} data-channel={id} class={spec.enabled ? undefined : "past"}>
              <th scope="row">
                <a href={`/alerts/messages?channel=${id}`} title={texts.messagesOf(spec.name)}>{spec.name}</a>
                {problem !== null && <span class="problem small">{problem}</span>}
              </th>
              <td data-label={columns.kind}>{textOf(texts.kinds, spec.target.kind)}</td>
              <td data-label={columns.receiver} class="receiver">{receiverText(spec.target)}</td>
              <td class="state"><StateBadge channel={channel} /></td>
              <td data-label={columns.delivered} title={delivered_at === null ? undefined : fullTime(ms(delivered_at))}>
                {delivered_at === null ? <span class="faint">{texts.never}</span> : shortTime(ms(delivered_at))}
              </td>
              <td class="act">
                <button type="button" aria-label={texts.testOf(spec.name)} onClick={() => test(channel)}>{texts.test}</button>
                <button type="button" aria-label={texts.editOf(spec.name)} onClick={() => open({ kind: "edit", channel })}>{texts.edit}</button>
                <button type="button" aria-label={texts.removeOf(spec.name)} onClick={() => open({ kind: "remove", channel })}>{texts.remove}</button>
              </td>
            </tr>
          );
        })}
      </tbody>
    </table>
  );
}

function StateBadge({ channel: { spec, problem, waiting } }: { channel: Channel }) {
  const texts = t().alerts.channels.states;
  if (!spec.enabled) return <Badge tone="quiet">{texts.off}</Badge>;
  if (problem !== null) return <Badge tone="bad" title={problem}>{texts.fails}</Badge>;
  return waiting > 0 ? <Badge tone="busy">{texts.waiting(waiting)}</Badge> : <Badge tone="good">{texts.works}</Badge>;
}

const receiverText = (target: Schemas["ChannelTarget"]): string => (target.kind === "email" ? target.to.join(", ") : target.url);

function RemoveDialog({ channel, close }: { channel: Channel; close: () => void }) {
  const texts = t().alerts.channels;
  const act = async () => {
    const params = { path: { id: channel.id }, query: { revision: channel.revision } };
    await ask(api.DELETE("/api/v1/alert-channels/{id}", { params }));
  };
  return (
    <FormDialog title={texts.removeTitle(channel.spec.name)} submit={texts.remove} dangerous act={act} close={close}>
      <p>{texts.removeText}</p>
    </FormDialog>
  );
}
