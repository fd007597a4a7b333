// Story: every view has no axe violations and no horizontal overflow, in one theme, on a wide and a narrow screen.
import { accessible, check, setting, signIn, story, until, url } from "./browser.mjs";

const colorScheme = setting("VMWATCH_PAGE_THEME");
const vm = setting("VMWATCH_PAGE_VM");

const VIEWS = {
  "the list": ["/", "table.vms tbody tr"],
  "an empty search": ["/?q=there-is-none", ".notice"],
  "a VM": [`/vms/${vm}?range=15m`, "table.process tbody tr"],
  "a process": [`/vms/${vm}?range=15m&process=vmwatch-agent`, "section.history canvas"],
  "processes by user": [`/vms/${vm}?range=15m&group=user`, "table.grouped tbody tr"],
  "no such VM": ["/vms/none-such", ".notice"],
  "an empty search of processes": ["/processes", ".notice"],
  "the VMs that ran a process": ["/processes?name=vmwatch&match=prefix&range=24h", "table.found tbody tr"],
  "a process that no VM ran": ["/processes?name=none-such", ".notice"],
  alerts: ["/alerts", "main .cards, main .notice"],
  "the rules of alerts": ["/alerts/rules", "table.rules tbody tr"],
  "a new rule": ["/alerts/rules/new", ".editor"],
  silences: ["/alerts/silences", ".notice"],
  channels: ["/alerts/channels", ".notice"],
  "messages of channels": ["/alerts/messages", ".notice"],
  operations: ["/operations", "h1"],
  agents: ["/agents", "section.tokens p, section.tokens table"],
  audit: ["/audit", "table.records tbody tr"],
  users: ["/users", "table.users tbody tr"],
  status: ["/status", ".status section[data-part=programs] dd"],
  sessions: ["/sessions", "table.sessions tbody tr"],
  "API tokens": ["/tokens", ".notice"],
  "no such view": ["/none/such", ".notice"],
};
const SIZES = [{ width: 1280, height: 900 }, { width: 375, height: 720 }];

await story(async (page, { faults }) => {
  await page.goto(url);
  await page.locator('input[name="user"]').waitFor();
  await accessible(page, `the sign-in, ${colorScheme}`, faults);
  await signIn(page);
  for (const size of SIZES) {
    await page.setViewportSize(size);
    for (const [name, [address, shown]] of Object.entries(VIEWS)) {
      const what = `${name}, ${colorScheme}, ${size.width} px`;
      await page.goto(url + address);
      await page.locator(shown).first().waitFor();
      const theme = await page.evaluate(() => document.documentElement.dataset.theme);
      check(theme === colorScheme, `${what} uses the system theme`);
      const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
      check(wide <= 0, `${what} is ${wide} px wider than the screen`);
      await accessible(page, what, faults);
    }
    await page.goto(`${url}/users`);
    await page.locator(".heading button.primary").click();
    await page.locator("dialog[open]").waitFor();
    await accessible(page, `the dialog to add a user, ${colorScheme}, ${size.width} px`, faults);
    await page.keyboard.press("Escape");
    await page.goto(`${url}/tokens`);
    await page.locator(".heading button.primary").click();
    await page.locator("dialog[open]").waitFor();
    await accessible(page, `the dialog to create an API token, ${colorScheme}, ${size.width} px`, faults);
    await page.keyboard.press("Escape");
    await page.goto(url);
    await page.locator("button.add-vm").click();
    await page.locator("dialog[open] summary").click();
    await accessible(page, `the dialog to add a VM, ${colorScheme}, ${size.width} px`, faults);
    await page.keyboard.press("Escape");
    await page.locator(".account summary").click();
    await accessible(page, `the settings, ${colorScheme}, ${size.width} px`, faults);
  }
  await endsAnotherSession(page);
  await createsAndRevokesToken(page, faults);
}, { colorScheme });

/** Lists a session of another device and ends it. */
async function endsAnotherSession(page) {
  const credentials = { user_name: setting("VMWATCH_PAGE_USER"), password: setting("VMWATCH_PAGE_PASSWORD") };
  const made = await page.request.post(`${url}/api/v1/sessions`, { data: credentials });
  const { token } = await made.json();
  await page.goto(`${url}/sessions`);
  const rows = page.locator("table.sessions tbody tr");
  await rows.first().getByRole("button", { name: "Sign out" }).waitFor();
  const before = await rows.count();
  check(before >= 2, `expected at least 2 sessions, found ${before}`);
  await rows.nth(1).getByRole("button").click();
  await page.locator("dialog[open] button.danger").click();
  await until("the ended session disappears from the list", async () => (await rows.count()) === before - 1);
  await until("the token of the ended session is rejected", async () => {
    const me = await page.request.get(`${url}/api/v1/me`, { headers: { Authorization: `Bearer ${token}` } });
    return me.status() === 401;
  });
}

/** Creates an API token, which is shown once and works, and revokes it. */
async function createsAndRevokesToken(page, faults) {
  const status = async (token) => {
    // The session cookie of the page must not answer for the token.
    const me = await fetch(`${url}/api/v1/me`, { headers: { Authorization: `Bearer ${token}` } });
    return me.status;
  };
  await page.goto(`${url}/tokens`);
  await page.locator(".heading button.primary").click();
  await page.locator('dialog[open] input[name="name"]').fill("Grafana");
  await page.locator('dialog[open] button[type="submit"]').click();
  const shown = page.locator("dialog[open] .copy-line code");
  const token = await shown.textContent();
  check(/^vmt_[0-9a-f]{16}_[0-9a-f]{64}$/.test(token ?? ""), "the dialog shows the token");
  check((await status(token)) === 200, "the new token is accepted");
  await accessible(page, `the new API token, ${colorScheme}`, faults);
  await page.keyboard.press("Escape");
  const rows = page.locator("table.tokens tbody tr");
  await rows.first().waitFor();
  await accessible(page, `API tokens, ${colorScheme}`, faults);
  check(!(await page.content()).includes(token), "the list does not contain the token");
  check((await rows.first().textContent()).includes("read only"), "the list shows what the token permits");
  await page.getByRole("button", { name: "All users" }).click();
  await page.getByRole("columnheader", { name: "Owner" }).waitFor();
  await rows.first().getByRole("button", { name: "Revoke token Grafana" }).click();
  await page.locator("dialog[open] button.danger").click();
  await until("the revoked token disappears from the list", async () => (await rows.count()) === 0);
  await until("the revoked token is rejected", async () => (await status(token)) === 401);
}
