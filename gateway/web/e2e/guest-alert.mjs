// Story: a process uses the CPU of a VM; the page shows the alert with that process; the operator acknowledges the alert; it is
// resolved when the process ends. The VM and the process are real.
import { check, command, setting, signIn, story, until, url } from "./browser.mjs";

const vm = setting("VMWATCH_PAGE_VM");
const culprit = setting("VMWATCH_PAGE_PROCESS");
const rule = setting("VMWATCH_PAGE_RULE");

await story(async (page) => {
  await signIn(page);
  await page.goto(`${url}/alerts`);
  await page.getByLabel("State").waitFor();
  await command("burn");
  const alert = page.locator('.alert[data-state="firing"]', { hasText: rule });
  await alert.waitFor({ timeout: 90_000 });
  const summary = alert.locator("summary");
  await until("the alert names the process", async () => (await summary.innerText()).includes(culprit));
  await summary.click();
  const row = alert.locator(".culprits tbody tr", { hasText: culprit });
  check(/\d%/.test(await row.innerText()), "the table shows the share of the process");
  await command("notified");

  await page.goto(`${url}/vms/${vm}`);
  const note = page.locator(".vm-alerts .alert", { hasText: rule });
  await note.getByRole("button", { name: "Acknowledge" }).click();
  await note.getByText("acknowledged by").waitFor();
  await page.goto(`${url}/alerts`);
  const acknowledged = page.locator('.alert[data-state="acknowledged"]', { hasText: rule });
  await acknowledged.waitFor();

  await command("rest");
  await acknowledged.waitFor({ state: "detached", timeout: 90_000 });
  await page.getByLabel("State").selectOption("resolved");
  await page.locator('.alert[data-state="resolved"]', { hasText: rule }).first().waitFor();
  await command("ended");
});
