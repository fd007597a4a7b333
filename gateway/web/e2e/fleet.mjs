// Story: measures how fast the web page shows 1,000 VMs and a year of samples.
import { check, figure, setting, signIn, story, until } from "./browser.mjs";

const busiest = setting("VMWATCH_PAGE_VM");

await story(async (page) => {
  await signIn(page);
  await page.locator(`tr[data-vm="${busiest}"]`).waitFor();
  await page.locator('a[href="/operations"]').click();
  await page.locator("h1", { hasText: "Operations" }).waitFor();
  let began = Date.now();
  await page.locator('nav a[href="/"]').click();
  const first = page.locator("table.vms tbody tr").first();
  await first.waitFor();
  figure("page: list of 1,000 VMs, ms from the click", Date.now() - began);
  check((await first.getAttribute("data-vm")) === busiest, "the busiest VM is the first in the list");
  check((await page.locator("table.vms").getAttribute("aria-rowcount")) === "1001", "the table states the number of all VMs");
  const inDocument = await page.locator("table.vms tbody tr").count();
  check(inDocument < 100, `expected only the rows on the screen in the document, found ${inDocument}`);

  await page.evaluate(() => scrollTo(0, document.body.scrollHeight));
  await page.locator('tr[aria-rowindex="1001"]').waitFor();
  await page.evaluate(() => scrollTo(0, 0));
  await page.locator('.filters input[type="search"]').fill("fleet-0777");
  await until("the search leaves one VM in the list", async () => (await page.locator("table.vms tbody tr").count()) === 1);
  await page.locator('.filters input[type="search"]').fill("");

  await page.locator(`tr[data-vm="${busiest}"] a`).click();
  await page.locator('[data-chart="cpu"] canvas').waitFor();
  await page.route("**/samples?**", (route) => route.continue());
  const answered = page.waitForResponse((response) => response.url().includes("/samples?"));
  began = Date.now();
  await page.getByRole("button", { name: "1 year" }).click();
  const buckets = (await (await answered).json()).buckets.length;
  await until("the charts of one year are drawn", () => page.evaluate(() => document.querySelector(".between")?.ariaBusy === "false"));
  figure("page: charts of one year, ms from the click", Date.now() - began);
  check(buckets > 100 && buckets <= 600, `expected 101 to 600 buckets for one year, found ${buckets}`);
});
