// Benchmark: an open page that shows the list of a large reporting fleet. Prints how soon the first rows appear after
// signing in, and how many list requests the page sends in a minute.
import { admin, figure, setting, story } from "./browser.mjs";

const MINUTE_MS = 60_000;

await story(async (page) => {
  const isList = (request) => new URL(request.url()).pathname === "/api/v1/vms";
  const count = { sent: 0, aborted: 0 };
  page.on("request", (request) => (count.sent += Number(isList(request))));
  page.on("requestfailed", (request) => (count.aborted += Number(isList(request))));
  await page.goto(setting("VMWATCH_PAGE_URL"));
  await page.locator('input[name="user"]').fill(admin.user);
  await page.locator('input[name="password"]').fill(admin.password);
  const began = Date.now();
  await page.locator('button[type="submit"]').click();
  await page.locator("table.vms tbody tr[data-vm]").first().waitFor();
  figure("tab_first_rows_ms", Date.now() - began);
  await page.waitForTimeout(MINUTE_MS - (Date.now() - began));
  figure("tab_list_requests_per_minute", count.sent);
  figure("tab_list_requests_aborted", count.aborted);
});
