// Story: the views about alerts, with answers that the story supplies: what they show and send, accessibility and width.
import { alertsOf, preview, stubAlerts } from "./alert-fixtures.mjs";
import { accessible, check, setting, signIn, story, until, url } from "./browser.mjs";

const [db, web, off] = setting("VMWATCH_PAGE_MACHINES").split(",").map((machine) => {
  const [instance_id, vm_name] = machine.split("=");
  return { instance_id, vm_name };
});

const VIEWS = {
  "the list of VMs": ["/", "table.vms .name .badge"],
  "a VM with alerts": [`/vms/${db.instance_id}?range=1h`, ".vm-alerts .alert"],
  "the alerts": ["/alerts", ".alert"],
  "an alert": [`/alerts/${"1".padStart(32, "0")}`, ".alert .culprits"],
  "no alerts": ["/alerts?state=pending&severity=info", ".notice"],
  "no such alert": [`/alerts/${"f".repeat(32)}`, ".notice"],
  "the rules": ["/alerts/rules", "table.rules tbody tr"],
  "a new rule": ["/alerts/rules/new", ".editor"],
  "the silences": ["/alerts/silences", "table.silences tbody tr"],
  "the channels": ["/alerts/channels", "table.channels tbody tr"],
  "the messages": ["/alerts/messages", ".message"],
};

for (const [colorScheme, locale, width] of [["light", "en-GB", 1280], ["dark", "zh-CN", 375]]) {
  await story(async (page, { faults }) => {
    const stub = await stubAlerts(page, { alerts: alertsOf(db, web, off), previewed: preview(db, web) });
    await signIn(page);
    for (const [name, [address, shown]] of Object.entries(VIEWS)) {
      const what = `${name}, ${colorScheme}, ${width} px`;
      await page.goto(url + address);
      await page.locator(shown).first().waitFor();
      const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
      check(wide <= 0, `${what} is ${wide} px wider than the screen`);
      await accessible(page, what, faults);
    }
    if (locale === "en-GB") await works(page, stub, faults);
  }, { colorScheme, locale, viewport: { width, height: 860 } });
}

/** What the views show and send. */
async function works(page, stub, faults) {
  const reads = stub.requests.filter((request) => request.includes("state=firing&limit=1000"));
  await page.goto(url);
  const badge = (vm) => page.locator(`tr[data-vm="${vm.instance_id}"] .name .badge`);
  await badge(db).waitFor();
  check((await badge(db).innerText()) === "CPU above 95 %", "the list names the only firing alert of a VM");
  check((await badge(web).getAttribute("title")).includes("nginx"), "the title has the subject");
  check(reads.length > 0 && stub.requests.every((request) => !request.includes("state=firing") || !request.includes("instance_id")),
    "the firing alerts of all VMs are read with one request");

  await page.goto(`${url}/alerts`);
  const alert = page.locator(".alert", { hasText: "CPU above 95 %" });
  await alert.waitFor();
  check((await alert.locator("summary").innerText()).replace(/\s+/g, " ").includes("81% pg_restore PID 4121"), "the first culprit is shown");
  check((await page.locator(".alert").first().getAttribute("class")).includes("critical"), "the most severe alert is first");
  check((await page.locator(".firing-count [aria-hidden]").innerText()) === "4", "the navigation has the number of firing alerts");
  check((await page.locator(".alert", { hasText: "Filesystem" }).getByText("acknowledged by ann").count()) === 1, "the user is named");
  check((await page.locator(".no-recipients").count()) === 0, "rules have recipients");
  await alert.getByRole("button", { name: "Acknowledge" }).click();
  await alert.getByText("acknowledged by admin").waitFor();
  check(stub.requests.some((request) => /^PUT .*acknowledgement$/.test(request)), "the acknowledgement is sent");

  await alert.getByRole("button", { name: "Silence" }).click();
  await page.locator('dialog input[name="comment"]').fill("restore of the orders");
  await accessible(page, "the dialog of a silence", faults);
  await page.locator('dialog button[type="submit"]').click();
  const silence = await sent(stub, "POST", "matchers");
  check(silence.matchers.rule === "CPU above 95 %" && silence.matchers.instance_id === db.instance_id, "the labels of the alert are sent");
  check(Date.parse(silence.to) - Date.parse(silence.from) === 3_600_000, "a silence lasts for an hour by default");

  stub.hasRecipients = false;
  await page.reload();
  await page.getByText("alerts notify nobody").waitFor();
  await page.getByLabel("State").selectOption("resolved");
  await page.locator(".alert", { hasText: "ended by Start (ann)" }).waitFor();

  await editsRule(page, stub, faults);
  await editsChannel(page, stub, faults);
}

async function editsRule(page, stub, faults) {
  await page.goto(`${url}/alerts/rules`);
  const row = page.locator("tr", { hasText: "CPU usage above 95% for 15 min" });
  check((await row.innerText()).includes("label env=prod · named db-*"), "the rule names its VMs");
  await row.getByRole("link", { name: "Edit" }).click();
  await page.locator('input[name="clear"]').fill("85");
  await page.getByRole("button", { name: "Preview the last 7 days" }).click();
  await page.getByText("Would have fired 7 times on 2 VMs.").waitFor();
  await page.getByText("Only 50 of the 64 selected VMs were evaluated.").waitFor();
  await accessible(page, "the preview of a rule", faults);
  await page.locator('select[name="kind"]').selectOption("process_count");
  await page.getByText("The rule has changed since this preview.").waitFor();
  await page.locator('input[name="process"]').fill("postgres");
  await page.getByRole("button", { name: "Preview the last 7 days" }).click();
  await page.getByText("Rules about processes have no preview").waitFor();
  await page.getByRole("button", { name: "Save rule" }).click();
  const { revision, spec } = await sent(stub, "PUT", "process_count");
  const condition = { kind: "process_count", name: "postgres", threshold: { direction: "below", limit: 1 } };
  check(revision === 4 && JSON.stringify(spec.condition) === JSON.stringify(condition), `the changed rule is sent: ${JSON.stringify(spec)}`);
  check(spec.for_seconds === 900 && spec.recipients.length === 2 && spec.vms.name === "db-*", "the other fields are kept");
}

async function editsChannel(page, stub, faults) {
  await page.goto(`${url}/alerts/channels`);
  await page.getByText("alert-svc has no key").waitFor();
  await page.getByRole("button", { name: "Edit channel Operations" }).click();
  const secret = page.locator('dialog input[name="secret"]');
  check((await secret.inputValue()) === "", "the secret is not shown");
  await page.locator("dialog .options summary").click();
  await page.locator('dialog input[name="heartbeat"]').fill("60");
  await accessible(page, "the dialog of a channel", faults);
  await page.locator('dialog button[type="submit"]').click();
  const change = await sent(stub, "PUT", "heartbeat");
  check(change.spec.heartbeat_seconds === 60 && change.spec.repeat_seconds === 14_400, "the intervals are sent");
  check(!("secret" in change) && change.forget_secret === false, "a secret that was not entered is kept");
  await until("the dialog is closed", async () => (await page.locator("dialog[open]").count()) === 0);
  await page.getByRole("button", { name: "Send a test through Operations" }).click();
  await page.getByRole("heading", { name: "Messages of Operations" }).waitFor();
  const message = page.locator('.message[data-state="delivered"]').first();
  await message.locator("summary").click();
  await message.getByText("250 2.0.0 Ok").waitFor();
}

/** The body of a request that the page has sent. */
function sent(stub, method, part) {
  return until(`the page sends ${part}`, () => {
    const request = stub.requests.find((request) => request.startsWith(`${method} {`) && request.includes(part));
    return request && JSON.parse(request.slice(method.length + 1));
  });
}
