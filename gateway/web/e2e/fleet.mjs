// A thousand VMs and a year, measured; asserted only where a wrong design would break them.
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
  figure("page: the list of 1,000 VMs, ms from the click", Date.now() - began);
  check((await first.getAttribute("data-vm")) === busiest, "the busiest is first");
  check((await page.locator("table.vms").getAttribute("aria-rowcount")) === "1001", "all are there");
  const inDocument = await page.locator("table.vms tbody tr").count();
  check(inDocument < 100, `only those on the screen are in the document, not ${inDocument}`);

  await page.evaluate(() => scrollTo(0, document.body.scrollHeight));
  await page.locator('tr[aria-rowindex="1001"]').waitFor();
  await page.evaluate(() => scrollTo(0, 0));
  await page.locator('.filters input[type="search"]').fill("fleet-0777");
  await until("the search leaves one", async () => (await page.locator("table.vms tbody tr").count()) === 1);
  await page.locator('.filters input[type="search"]').fill("");

  await page.locator(`tr[data-vm="${busiest}"] a`).click();
  await page.locator('[data-chart="cpu"] canvas').waitFor();
  await page.route("**/samples?**", (route) => route.continue());
  const answered = page.waitForResponse((response) => response.url().includes("/samples?"));
  began = Date.now();
  await page.getByRole("button", { name: "1 year" }).click();
  const buckets = (await (await answered).json()).buckets.length;
  await until("the year is drawn", () => page.evaluate(() => document.querySelector(".between")?.ariaBusy === "false"));
  figure("page: the charts of a year, ms from the click", Date.now() - began);
  check(buckets > 100 && buckets <= 600, `a year is some hundred buckets, not ${buckets}`);
});
