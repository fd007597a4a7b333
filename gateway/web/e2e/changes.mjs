// Story: an operator starts a VM, sees the marks on its charts, and finds what changed around a reboot and between two moments
// that it chooses.
import { accessible, check, command, setting, signIn, story, until, url } from "./browser.mjs";

const vm = setting("VMWATCH_PAGE_VM");

await story(async (page, { faults }) => {
  const now = Number(await command("report"));
  await signIn(page);
  await page.goto(`${url}/vms/${vm}?range=1h`);
  await page.locator('[data-chart="cpu"] canvas').waitFor();
  await lists(page, "vm_start", "VM started", 2);
  await lists(page, "agent_start", "Agent started", 3);

  // An operation is marked live.
  await page.locator(".actions button.primary").click();
  const operation = page.locator('.marks li[data-kind="operation"]');
  await until("the operation is listed and has succeeded", async () => (await operation.innerText()).includes("succeeded"));
  check((await operation.innerText()).includes("requested by"), "the operation names its user");

  // The reboot 30 minutes ago: nginx ran before and after it, so it neither came nor went.
  const reboot = page.locator('.marks li[data-kind="vm_start"]').first();
  await reboot.locator("button.around").click();
  const changed = page.locator(".changes table.changed");
  await changed.waitFor();
  const title = page.locator(".changes h2");
  await until("the comparison has the focus", () => title.evaluate((element) => element === document.activeElement));
  const { y } = await title.boundingBox();
  check(y >= 0 && y < 900, `the title of the comparison is on the screen, at ${y}`);
  check((await page.locator(".changes .summary .badge").innerText()).startsWith("VM started"), "the reboot is named");
  const names = (kind) => changed.locator(`tbody[data-change="${kind}"] tr:not(.kind) th.name`).allInnerTexts();
  check((await names("came")).join() === "backup", `a process came with the reboot: ${await names("came")}`);
  check((await names("went")).join() === "job", `a process went with the reboot: ${await names("went")}`);
  // The address holds the compared moments.
  await page.reload();
  await changed.waitFor();
  await lists(page, "agent_start", "Agent started", 3);
  await page.setViewportSize({ width: 375, height: 720 });
  const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  check(wide <= 0, `the view of the VM is ${wide} px wider than a narrow screen`);
  await accessible(page, "what changed, on a narrow screen", faults);
  await page.setViewportSize({ width: 1280, height: 900 });
  await accessible(page, "what changed", faults);

  // Moments that the user chooses: 15 minutes ago, and now.
  await page.getByLabel("Before", { exact: true }).fill(await local(page, now - 15 * 60_000));
  await page.getByLabel("After", { exact: true }).fill(await local(page, now));
  await until("the burner came", async () => (await names("came")).join() === "burner");
  check((await names("went")).join() === "backup", `the backup went: ${await names("went")}`);
  check((await names("grew")).join() === "nginx", `nginx grew: ${await names("grew")}`);
  const grown = (await changed.locator('tbody[data-change="grew"] tr', { hasText: "nginx" }).innerText()).replace(/\s+/g, " ");
  check(grown.includes("2.0% → 50.0%"), `the CPU usage of nginx before and after: ${grown}`);
  check((await page.locator(".changes .summary .badge").count()) === 0, "there was no reboot between the moments");

  // A pinned moment can be compared, and moments in the wrong order are refused with an explanation.
  await page.locator('.marks li[data-kind="agent_start"] button.link').last().click();
  await until("the moment is pinned", () => page.url().includes("at="));
  await page.getByRole("button", { name: "Use pinned moment as After" }).click();
  await page.locator(".changes [role=alert]").waitFor();
  await page.locator(".changes .heading button").click();
  await until("the comparison is closed", async () => (await page.locator(".changes").count()) === 0);
  await saysWhichMarksAreMissing(page);
});

async function saysWhichMarksAreMissing(page) {
  const note = page.getByText("Operations could not be read");
  check((await note.count()) === 0, "no marks are missing");
  await page.route(/\/marks\?/, async (route) => {
    const marks = await (await route.fetch()).json();
    await route.fulfill({ json: { ...marks, missing: ["alerts", "operations"] } });
  });
  await page.reload();
  await note.waitFor();
  check((await page.getByText("Process tables could not be read").count()) === 0, "only missing marks are named");
  await page.unroute(/\/marks\?/);
}

async function lists(page, kind, text, count) {
  const marks = page.locator(`.marks li[data-kind="${kind}"]`);
  await until(`${count} marks of ${kind} are listed`, async () => {
    const details = page.locator("details.marks");
    if ((await details.getAttribute("open")) === null) await details.locator("summary").click();
    return (await marks.count()) === count;
  });
  check((await marks.first().innerText()).includes(text), `the mark says ${text}`);
}

/** The value of an input for a time in the time zone of the browser. */
async function local(page, at) {
  return page.evaluate((at) => new Date(at - new Date(at).getTimezoneOffset() * 60_000).toISOString().slice(0, 19), at);
}
