// The connection is lost, said to be lost, and comes back by itself, with what was missed.
import { check, demand, figure, setting, signIn, story, until, url } from "./browser.mjs";

const machine = setting("VMWATCH_PAGE_VM");

await story(async (page) => {
  await signIn(page);
  await page.locator(".live.live").waitFor();
  // From the agent's sample, by its own clock, to the row on the screen.
  await page.goto(`${url}/vms/${machine}?range=15m`);
  await page.locator('[data-chart="cpu"] canvas').waitFor();
  await page.locator(".live.live").waitFor();
  const moment = () => page.locator(".processes .moment").getAttribute("data-at").then(Number);
  const lags = [];
  let last = await moment();
  await until("ten tables came", async () => {
    const now = await moment();
    if (now > last) lags.push(Date.now() - now);
    last = now;
    return lags.length >= 10;
  });
  lags.sort((one, other) => one - other);
  figure("page: from the agent's sample to the process table on the screen, ms, median of 10", lags[5]);

  await demand("lose");
  await page.locator(".banner.bad").waitFor();
  check((await page.locator(".live.lost").count()) === 1, "the mark says so too");
  await demand("regain");
  await page.locator(".live.live").waitFor();
  await until("nothing says that it is lost", async () => (await page.locator(".banner.bad").count()) === 0);
  const after = Date.now();
  await until("what is shown goes on", async () => (await moment()) > after);
  check((await page.locator("table.process tbody tr").count()) > 3, "the table is there");
});
