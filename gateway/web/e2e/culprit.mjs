// Story: an operator finds the process that uses the CPU, now and at a past moment.
import { readFileSync } from "node:fs";
import { check, command, figure, setting, signIn, story, until, url } from "./browser.mjs";
import { showsFilesystems } from "./filesystems.mjs";
import { showsGroups } from "./groups.mjs";

const vm = setting("VMWATCH_PAGE_VM");

await story(async (page) => {
  await page.goto(url);
  await page.locator('input[name="user"]').fill("nobody");
  await page.locator('input[name="password"]').fill("certainly wrong");
  await page.locator('button[type="submit"]').click();
  await page.getByRole("alert").waitFor();
  check((await page.locator("header.top").count()) === 0, "a wrong password is rejected");
  await signIn(page);

  // The table row of this VM must show live values.
  const row = page.locator(`tr[data-vm="${vm}"]`);
  await row.waitFor();
  const values = new Set();
  const read = async () => (await row.locator("td.number").allInnerTexts()).join(" ");
  await until("the VM's row shows three different live samples", async () => values.add(await read()).size >= 3);

  await row.locator("a").click();
  await page.locator('[data-chart="cpu"] canvas').waitFor();
  await until("the processes explain a part of the VM's CPU time", async () =>
    /\d%/.test(await page.locator(".accounted").innerText()));
  check((await page.locator("figure.chart").count()) >= 5, "the VM's view has a chart of the load beside that of the CPU");
  await page.getByRole("button", { name: "15 min" }).click();
  const burner = await command("burn");
  const first = page.locator("table.process tbody tr").first();
  await until(`${burner} is first in the table`, async () => (await first.locator("th").innerText()).startsWith(burner));
  const sampled = () => page.locator(".processes .moment").getAttribute("data-at").then(Number);
  const since = await sampled();
  // Fifteen seconds are long enough to cover several points of the chart.
  await until("the process has run for fifteen seconds", async () => (await sampled()) - since > 15_000);
  const then = since + 8_000;
  await command("rest");
  const names = page.locator("table.process tbody th");
  await until("the stopped process leaves the current process table", async () =>
    !(await names.allInnerTexts()).some((name) => name.startsWith(burner)));

  // Hovering over that moment in the chart must show the process again.
  const over = page.locator('[data-chart="mem"] .u-over');
  const began = Date.now();
  await until("the process table of the moment under the pointer shows the stopped process", async () => {
    const box = await over.boundingBox();
    const share = 1 - (Date.now() - then) / 900_000;
    await page.mouse.move(box.x + box.width * share - 1, box.y + 30);
    await page.mouse.move(box.x + box.width * share, box.y + 30);
    await page.waitForTimeout(200);
    return (await first.locator("th").innerText()).startsWith(burner);
  });
  figure("page: table of a past moment under the pointer, ms, including a wait of 200", Date.now() - began);

  // A shared URL must show the same moment.
  await page.goto(`${url}/vms/${vm}?range=15m&at=${new Date(then).toISOString()}`);
  await until("the page opened from the URL shows the process table of that moment", async () => (await first.locator("th").innerText()).startsWith(burner));
  await first.locator("button").click();
  await page.locator('[data-chart="process-cpu"] canvas').waitFor();
  check(page.url().includes(`process=${burner}`), "the URL contains the name of the process");

  // The samples of this process can be downloaded.
  await page.getByRole("button", { name: "Download…" }).click();
  const dialog = page.locator("dialog[open]");
  const [file] = await Promise.all([page.waitForEvent("download"), dialog.locator('button[type="submit"]').click()]);
  const lines = readFileSync(await file.path(), "utf8").trimEnd().split("\r\n");
  check(file.suggestedFilename().endsWith(".csv") && lines[0].startsWith("net_incoming,"), "the file is a CSV file");
  check(lines.length > 2 && lines.slice(1).every((line) => line.includes(`,${burner},`)), "the file has the rows of the process");
  await dialog.waitFor({ state: "detached" });
  await page.keyboard.press("Escape");
  await until("the Esc key unpins the moment", () => !page.url().includes("at="));

  // The search finds the VM that ran the process, and leads to the moment at which it was last seen.
  await page.locator("header.top nav").getByRole("link", { name: "Processes" }).click();
  await page.getByRole("searchbox", { name: "Process name" }).fill(burner);
  const found = page.locator("table.found tbody tr");
  await until("the search finds the VM", async () => {
    await page.getByRole("button", { name: "Search", exact: true }).click();
    await page.locator("table.found, .notice").first().waitFor();
    if ((await found.count()) > 0) return true;
    await page.reload();
    return false;
  });
  check((await found.getAttribute("data-vm")) === vm, "the search finds only this VM");
  check(page.url().endsWith(`/processes?name=${burner}`), "the URL contains the search");
  await found.getByRole("link").click();
  // In its last row the process has ended and uses no CPU, so that others come first.
  await page.locator('.processes input[type="search"]').fill(burner);
  await until("the link leads to the processes of that moment", async () =>
    (await names.allInnerTexts()).some((name) => name.startsWith(burner)));
  await page.locator('[data-chart="process-cpu"] canvas').waitFor();
  await page.goto(`${url}/processes?name=${burner.slice(0, 3)}&match=prefix&range=1h`);
  await found.first().waitFor();
  await page.goto(`${url}/processes?name=ab&match=prefix`);
  await page.getByRole("heading", { name: "Enter more of the name" }).waitFor();
  await page.goto(`${url}/vms/${vm}?range=15m`);
  await over.waitFor();

  // Dragging across the chart zooms, and the Back button undoes the zoom.
  const box = await over.boundingBox();
  await page.mouse.move(box.x + box.width * 0.4, box.y + 40);
  await page.mouse.down();
  await page.mouse.move(box.x + box.width * 0.8, box.y + 40, { steps: 4 });
  await page.mouse.up();
  await until("dragging across a chart zooms in", () => page.url().includes("from="));
  await page.goBack();
  await until("the Back button zooms out", () => !page.url().includes("from="));

  // The process table can be filtered by name, and a click on the chart pins the moment.
  await page.locator('.processes input[type="search"]').fill("vmwatch-agent");
  await until("the name filter leaves only the agent's process", async () =>
    (await names.allInnerTexts()).every((name) => name.startsWith("vmwatch-agent")));
  // Filling in the filter has scrolled the page.
  await page.evaluate(() => scrollTo(0, 0));
  const chart = await over.boundingBox();
  await page.mouse.click(chart.x + chart.width * 0.98, chart.y + 40);
  await until("a click on a chart pins the moment", () => page.url().includes("at="));

  // Of a storm of short-lived processes, most share a row, which is above all others and has their number.
  await page.goto(`${url}/vms/${vm}`);
  const shell = await command("storm");
  const head = () => first.locator("th").innerText();
  await until("the sum of short-lived processes is first in the table, with their number", async () => {
    const text = await head();
    return text.startsWith(shell) && Number(/sum of (\d+)/.exec(text)?.[1]) > 50;
  });
  await page.getByRole("button", { name: "Name", exact: true }).click();
  await until("the group of short-lived processes is first, with their number", async () => {
    const count = await first.locator("td.count").innerText({ timeout: 1000 }).catch(() => "");
    return (await head()).includes(shell) && Number(count.replaceAll(",", "")) > 70;
  });
  await command("calm");

  // Guests can choose process names that make the process table larger than a bus message; the page must still show it.
  const hidden = await command("hide");
  await page.goto(`${url}/vms/${hidden}`);
  check((await page.locator(".accounted").innerText()).includes("unknown"), "without CPU seconds the share explained is unknown");
  await page.locator("button.more").click();
  await until("all 1,000 processes are shown", async () => (await page.locator("table.process tbody tr").count()) === 1000);
  check((await first.locator("th").innerText()).startsWith("\u2401"), "control characters are shown as symbols");
  await page.getByRole("button", { name: "Name", exact: true }).click();
  await until("one group has all 1,000 processes", async () => /1,000/.test(await page.locator("table.grouped .group .count").innerText()));
  const shop = await command("shop");
  await showsGroups(page, shop);
  await showsFilesystems(page, shop);
});
