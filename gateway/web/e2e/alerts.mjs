// Story: an operator creates a rule; a VM fires it; the page shows the alert with the process that explains it, everywhere
// and live; the operator acknowledges it; it is resolved.
import { accessible, check, command, setting, signIn, story, until, url } from "./browser.mjs";

const vm = setting("VMWATCH_PAGE_VM");
const culprit = setting("VMWATCH_PAGE_PROCESS");
const RULE = "CPU of the story";

await story(async (page, { faults }) => {
  await signIn(page);
  await page.locator(`tr[data-vm="${vm}"]`).waitFor();
  await createsRule(page);

  await command("burn");
  await page.locator('header.top a[href="/alerts"]').click();
  const alert = page.locator(`.alert[data-state="firing"]`, { hasText: RULE });
  await alert.waitFor();
  await until("the number of firing alerts is in the navigation", async () => (await page.locator(".firing-count").count()) === 1);
  await until("the alert names its culprit", async () => (await alert.locator("summary").innerText()).includes(culprit));
  await alert.locator("summary").click();
  const row = alert.locator(".culprits tbody tr", { hasText: culprit });
  const text = (await row.innerText()).replace(/\s+/g, " ");
  for (const part of ["postgres", "backup.service", "4121"]) check(text.includes(part), `the culprit has ${part}: ${text}`);
  await accessible(page, "the list of alerts", faults);

  await page.goto(url);
  await page.locator(`tr[data-vm="${vm}"] .name .badge`, { hasText: RULE }).waitFor();
  await page.locator(`tr[data-vm="${vm}"] a`).click();
  await page.locator(".vm-alerts .alert", { hasText: RULE }).waitFor();
  await page.locator(".past-alerts").waitFor();
  await accessible(page, "the VM with an alert", faults);

  // Acknowledged on the page of the VM, shown live.
  const note = page.locator(".vm-alerts .alert", { hasText: RULE });
  await note.getByRole("button", { name: "Acknowledge" }).click();
  await note.getByText("acknowledged by").waitFor();
  await until("no alert is firing", async () => (await page.locator(".firing-count").count()) === 0);

  // The link leads to the processes at the moment at which the alert fired.
  await note.locator("summary").click();
  await note.getByRole("link", { name: "Processes at that moment" }).click();
  await until("the moment is pinned", () => page.url().includes("at="));
  await page.locator("table.process tbody tr", { hasText: culprit }).waitFor();

  await page.goto(`${url}/alerts`);
  await page.locator('.alert[data-state="acknowledged"]', { hasText: RULE }).waitFor();
  await command("rest");
  await until("the resolved alert disappears live", async () => (await page.locator(".alert", { hasText: RULE }).count()) === 0);
  await page.getByLabel("State").selectOption("resolved");
  await page.locator('.alert[data-state="resolved"]', { hasText: RULE }).waitFor();
});

/** Creates a rule for the VM after previewing it. Before, the page says that no rule has recipients. */
async function createsRule(page) {
  await page.goto(`${url}/alerts`);
  await page.locator(".no-recipients").waitFor();
  await page.goto(`${url}/alerts/rules`);
  await page.locator("table.rules tbody tr").first().waitFor();
  await page.getByRole("link", { name: "New rule" }).click();
  await page.locator('input[name="name"]').fill(RULE);
  await page.locator('input[name="limit"]').fill("80");
  await page.locator('input[name="duration"]').fill("0");
  await page.locator('select[name="severity"]').selectOption("critical");
  await page.getByLabel("VMs that fulfil all of these").check();
  await page.locator('textarea[name="ids"]').fill(vm);
  await page.getByRole("button", { name: "Preview the last 7 days" }).click();
  await page.locator(".preview .limits").waitFor();
  await page.getByRole("button", { name: "Create rule" }).click();
  await page.locator("table.rules tbody tr", { hasText: RULE }).getByText("CPU usage above 80%").waitFor();
}
