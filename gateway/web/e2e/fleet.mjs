// Story: the list shows 1,200 reporting VMs with few rows in the document and few requests, and a year of samples.
import { check, command, figure, setting, signIn, story, until } from "./browser.mjs";

const busiest = setting("VMWATCH_PAGE_VM");
/** The VM that comes last by CPU usage, because it has none. */
const least = setting("VMWATCH_PAGE_LAST");
const VMS = 1200;
/** The period in which requests are counted, and the most that the page may send: one per 5 s, and one at the start. */
const PERIOD_MS = 15_000;
const MAX_REQUESTS = 4;

await story(async (page) => {
  const lists = watchLists(page);
  await page.goto(setting("VMWATCH_PAGE_URL"));
  await page.locator('input[name="user"]').waitFor();
  const signedIn = Date.now();
  await signIn(page);
  await page.locator(`tr[data-vm="${busiest}"]`).waitFor();
  figure("page: first rows of 1,200 VMs, ms from opening the page, including the sign-in", Date.now() - signedIn);

  await page.locator('a[href="/operations"]').click();
  await page.locator("h1", { hasText: "Operations" }).waitFor();
  let began = Date.now();
  await page.locator('nav a[href="/"]').click();
  const first = page.locator("table.vms tbody tr").first();
  await first.waitFor();
  figure("page: list of 1,200 VMs, ms from the click", Date.now() - began);
  check((await first.getAttribute("data-vm")) === busiest, "the busiest VM is first");
  check((await rowCount(page)) === String(VMS + 1), "all VMs are counted");
  await fewRows(page);

  await followsFleet(page, lists);
  await scrolls(page);
  await searches(page, lists);
  await worksByKeyboard(page);
  await showsYear(page);
});

/** Collects the requests for the list of VMs, in the order in which they are sent. */
function watchLists(page) {
  const lists = { sent: [], aborted: [], events: [] };
  const isList = (request) => new URL(request.url()).pathname === "/api/v1/vms";
  page.on("request", (request) => {
    if (isList(request)) lists.sent.push(new URL(request.url()).searchParams);
    if (request.url().includes("/api/v1/events")) lists.events.push(new URL(request.url()).searchParams);
  });
  page.on("requestfailed", (request) => isList(request) && lists.aborted.push(request.url()));
  return lists;
}

function rowCount(page) {
  return page.locator("table.vms").getAttribute("aria-rowcount");
}

async function fewRows(page) {
  const count = await page.locator("table.vms tbody tr").count();
  check(count < 100, `expected only the rows on the screen in the document, found ${count}`);
}

/** While all VMs report: few requests, none aborted; rows move except for the row under the pointer. */
async function followsFleet(page, lists) {
  await until("the page asks for the events of the rows on the screen", () =>
    lists.events.at(-1)?.get("instance_id")?.split(",").includes(busiest));
  const ids = lists.events.at(-1).get("instance_id").split(",");
  check(ids.length < 100, `expected the rows on the screen in the events, found ${ids.length}`);
  const row = (index) => page.locator(`tr[aria-rowindex="${index}"]`);
  const held = await row(5).getAttribute("data-vm");
  await row(5).hover();
  await command("report");
  const [sent, aborted] = [lists.sent.length, lists.aborted.length];
  await page.waitForTimeout(PERIOD_MS);
  const requests = lists.sent.length - sent;
  figure("page: requests for the list of 1,200 reporting VMs in 15 s", requests);
  check(requests > 0 && requests <= MAX_REQUESTS, `expected 1 to ${MAX_REQUESTS} requests, found ${requests}`);
  check(lists.aborted.length === aborted, `aborted ${lists.aborted.slice(aborted).join(", ")}`);

  const risen = await command("rise");
  await until("a VM that is not among the first rows rises to the top", async () =>
    (await row(2).getAttribute("data-vm")) === risen);
  check((await row(5).getAttribute("data-vm")) === held, "the row under the pointer has not moved");
  await page.mouse.move(0, 0);
  await until("the row moves when the pointer has left", async () =>
    (await row(5).getAttribute("data-vm")) !== held);
  await command("rest");
}

async function scrolls(page) {
  const toEnd = () => page.evaluate(() => scrollTo(0, document.body.scrollHeight));
  await toEnd();
  const last = page.locator("table.vms tbody tr").last();
  await until("the last VM is shown", async () => (await last.getAttribute("data-vm")) === least);
  const [index, count] = [await last.getAttribute("aria-rowindex"), await rowCount(page)];
  check(index === count, `expected the last VM in row ${count}, found it in row ${index}`);
  await fewRows(page);
  await page.evaluate(() => scrollTo(0, 0));
  await page.locator('tr[aria-rowindex="2"][data-vm]').waitFor();
}

/** Searches on the server, also for VMs that are not loaded; the answer to an earlier search is never shown. */
async function searches(page, lists) {
  const search = page.locator('.filters input[type="search"]');
  const rows = page.locator("table.vms tbody tr[data-vm]");
  check((await page.locator('tr[data-vm="fleet-0777"]').count()) === 0, "the VM to find is not among the first rows");
  const before = lists.sent.length;
  await search.pressSequentially("fleet-0777", { delay: 20 });
  await until("the search leaves one VM", async () => (await rows.count()) === 1);
  check((await rows.first().getAttribute("data-vm")) === "fleet-0777", "the search finds it");
  await page.getByText("1 matching VM", { exact: true }).waitFor();
  const requests = lists.sent.slice(before).filter((query) => query.has("q")).length;
  check(requests <= 3, `expected few requests while the user types, found ${requests}`);

  // The first page of the search for 0111 arrives after that of the search for 0222.
  let release;
  const released = new Promise((resolve) => (release = resolve));
  await page.route(/\/api\/v1\/vms\?.*q=fleet-0111/, async (route) => {
    const response = await route.fetch();
    await released;
    await route.fulfill({ response }).catch(() => undefined);
  });
  await search.fill("fleet-0111");
  await until("the slow search is sent", () => lists.sent.at(-1)?.get("q") === "fleet-0111");
  await search.fill("fleet-0222");
  await page.locator('tr[data-vm="fleet-0222"]').waitFor();
  release();
  await page.unrouteAll({ behavior: "wait" });
  check((await rows.count()) === 1, "only the new search is shown");
  check((await rows.first().getAttribute("data-vm")) === "fleet-0222", "the answer to the old search is not shown");

  await search.fill("");
  await until("all VMs are shown again", async () =>
    (await rowCount(page)) === String(VMS + 1));
  await page.getByLabel("Agent", { exact: true }).selectOption("never");
  await until("the filter leaves the VMs of the hypervisor", async () => (await rows.count()) === 3);
  await page.getByLabel("State", { exact: true }).selectOption("suspended");
  await page.getByText("No matching VMs").waitFor();
  await page.getByRole("button", { name: "Show all" }).click();
  await page.getByRole("button", { name: "VM", exact: true }).click();
  await until("the list is sorted by name on the server", () => lists.sent.at(-1)?.get("sort") === "name");
  await page.getByRole("button", { name: "CPU", exact: true }).click();
  await page.locator(`tr[aria-rowindex="2"][data-vm="${busiest}"]`).waitFor();
}

/** The arrow keys move between VMs, and the row with the focus stays while the list is scrolled. */
async function worksByKeyboard(page) {
  const focused = () => page.evaluate(() => document.activeElement?.closest("tr")?.getAttribute("aria-rowindex"));
  await page.locator('tr[aria-rowindex="2"] a').focus();
  await until("the arrow keys move the focus to row 62", async () =>
    (await focused()) === "62" || (await page.keyboard.press("ArrowDown")));
  const inView = await page.evaluate(() => {
    const { top, bottom } = document.activeElement.getBoundingClientRect();
    const header = document.querySelector(".vms thead th").getBoundingClientRect();
    return top >= header.bottom && bottom <= innerHeight;
  });
  check(inView, "the row with the focus is visible");
  await page.evaluate(() => scrollTo(0, document.body.scrollHeight));
  await page.locator(`tr[data-vm="${least}"]`).waitFor();
  check((await focused()) === "62", "the row with the focus stays in the document");
  await page.evaluate(() => scrollTo(0, 0));
}

async function showsYear(page) {
  await page.locator(`tr[data-vm="${busiest}"] a`).click();
  await page.locator('[data-chart="cpu"] canvas').waitFor();
  await page.route("**/samples?**", (route) => route.continue());
  const answered = page.waitForResponse((response) => /\/samples\?.*source=agent/.test(response.url()));
  const began = Date.now();
  await page.getByRole("button", { name: "1 year" }).click();
  const buckets = (await (await answered).json()).buckets.length;
  await until("the year is drawn", () => page.evaluate(() => document.querySelector(".between")?.ariaBusy === "false"));
  figure("page: charts of one year, ms from the click", Date.now() - began);
  check(buckets > 100 && buckets <= 600, `expected 101 to 600 buckets for one year, found ${buckets}`);
}
