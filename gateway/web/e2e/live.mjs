// Story: the web page shows a lost connection, reconnects by itself and then loads the missed data.
import { check, command, figure, setting, signIn, story, until, url } from "./browser.mjs";

const vm = setting("VMWATCH_PAGE_VM");

await story(async (page) => {
  await signIn(page);
  await page.locator(".live.live").waitFor();
  // Measure the latency from the time of a sample to its display in the process table.
  await page.goto(`${url}/vms/${vm}?range=15m`);
  await page.locator('[data-chart="cpu"] canvas').waitFor();
  await page.locator(".live.live").waitFor();
  const moment = () => page.locator(".processes .moment").getAttribute("data-at").then(Number);
  const lags = [];
  let last = await moment();
  await until("ten new process tables are shown", async () => {
    const now = await moment();
    if (now > last) lags.push(Date.now() - now);
    last = now;
    return lags.length >= 10;
  });
  lags.sort((one, other) => one - other);
  figure("page: from sample to process table on the screen, ms, median of 10", lags[5]);

  await showsSlowTables(page, moment);
  await command("lose");
  await page.locator(".banner.bad").waitFor();
  check((await page.locator(".live.lost").count()) === 1, "the header shows the lost connection");
  await command("regain");
  await page.locator(".live.live").waitFor();
  await until("the banner about the lost connection disappears", async () => (await page.locator(".banner.bad").count()) === 0);
  const after = Date.now();
  await until("live data is shown again after the reconnection", async () => (await moment()) > after);
  check((await page.locator("table.process tbody tr").count()) > 3, "the process table is shown");
});

/** The VM reports every second and its table takes longer: the page waits for each answer and aborts none. */
async function showsSlowTables(page, moment) {
  const aborted = [];
  const note = (request) => request.url().includes("/processes") && aborted.push(request.url());
  page.on("requestfailed", note);
  await page.route("**/processes?**", async (route) => {
    const response = await route.fetch();
    await new Promise((resolve) => setTimeout(resolve, 1_500));
    await route.fulfill({ response });
  });
  const shown = new Set([await moment()]);
  await until("two slow tables are shown", async () => shown.add(await moment()).size > 2);
  check(aborted.length === 0, `aborted ${aborted.join(", ")}`);
  await page.unrouteAll({ behavior: "wait" });
  page.off("requestfailed", note);
}
