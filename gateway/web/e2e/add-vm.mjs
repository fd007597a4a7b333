// Story: an administrator adds a VM with a command, follows it until it reports, and revokes its agent and join tokens.
import { accessible, check, command, setting, signIn, story, until, url } from "./browser.mjs";

const vm = setting("VMWATCH_PAGE_VM");
const key = setting("VMWATCH_PAGE_KEY");

await story(async (page, { context, faults }) => {
  await context.grantPermissions(["clipboard-read", "clipboard-write"]);
  await signIn(page);
  const dialog = page.locator("dialog[open]");
  await page.locator("button.add-vm").click();
  await accessible(page, "the dialog to add a VM", faults);
  await dialog.locator("summary").click();
  await dialog.locator('input[name="id"]').fill("not an id");
  await dialog.locator('button[type="submit"]').click();
  check((await dialog.locator(".command").count()) === 0, "an invalid id is not sent");
  await dialog.locator('input[name="id"]').fill(vm);
  await dialog.locator('button[type="submit"]').click();

  const line = await dialog.locator("code").innerText();
  const [, token] = /^curl -fsSL https:\/\/vmwatch\.example\.com\/install\.sh \| sudo VMWATCH_JOIN_TOKEN=(vmj_\w+) sh -s -- --instance-id (\S+)$/.exec(line)
    ?? [];
  check(token && line.endsWith(` ${vm}`), `this is not the install command: ${line}`);
  await dialog.getByRole("button", { name: "Copy" }).click();
  await dialog.getByText("Copied").waitFor();
  check((await page.evaluate(() => navigator.clipboard.readText())) === line, "the command is in the clipboard");
  await dialog.getByText("waiting for the VM…").waitFor();
  await accessible(page, "the command that adds a VM", faults);

  // What the agent does: it enrols with the token, then reports.
  const enroll = async (secret, instance_id) => {
    const data = { token: secret, instance_id, public_key: key };
    return (await page.request.post(`${url}/api/v1/agents`, { data })).status();
  };
  check((await enroll(token, `${vm}-other`)) === 403, "the token is only for this VM");
  check((await enroll(token, vm)) === 201, "the agent enrols");
  await dialog.locator(`[data-vm="${vm}"]`).getByText("enrolled, waiting for its first sample…").waitFor();
  await command("report");
  await dialog.locator(`[data-vm="${vm}"] a`).click();
  await page.locator("header.vm h1").waitFor();
  check(new URL(page.url()).pathname === `/vms/${vm}`, "the link leads to the VM");

  await agents(page, faults);
});

/** Lists the agent and its token, creates a further token, and revokes both. */
async function agents(page, faults) {
  await page.locator('a[href="/agents"]').click();
  const agent = page.locator(`tr[data-agent="${vm}"]`);
  await agent.getByText("enrolled").waitFor();
  await page.locator("table.tokens").getByText("used up").waitFor();
  await page.locator("button.add-vm").click();
  await page.locator('dialog[open] button[type="submit"]').click();
  await page.locator("dialog[open] code").waitFor();
  await page.keyboard.press("Escape");
  const token = page.locator("table.tokens tbody tr", { hasText: "valid" });
  await token.getByText("any VM").waitFor();
  await accessible(page, "agents", faults);
  for (const [row, state] of [[token, "table.tokens .badge.bad"], [agent, "table.agents .badge.bad"]]) {
    await row.getByRole("button", { name: "Revoke" }).click();
    await page.locator("dialog[open] button.danger").click();
    await page.locator(state).getByText("revoked").waitFor();
  }
  await until("revoked rows have no button", async () => (await page.locator("td.act button").count()) === 0);
}
