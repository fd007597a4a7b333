// Which process did it: now, and at a moment of the past.
import { check, demand, figure, setting, signIn, story, until, url } from "./browser.mjs";

const machine = setting("VMWATCH_PAGE_VM");

await story(async (page) => {
  await page.goto(url);
  await page.locator('input[name="user"]').fill("nobody");
  await page.locator('input[name="password"]').fill("certainly wrong");
  await page.locator('button[type="submit"]').click();
  await page.getByRole("alert").waitFor();
  check((await page.locator("header.top").count()) === 0, "a wrong password lets nobody in");
  await signIn(page);

  // This machine's row, and its values as they come.
  const row = page.locator(`tr[data-vm="${machine}"]`);
  await row.waitFor();
  const values = new Set();
  const read = async () => (await row.locator("td.number").allInnerTexts()).join(" ");
  await until("three samples came live", async () => values.add(await read()).size >= 3);

  await row.locator("a").click();
  await page.locator('[data-chart="cpu"] canvas').waitFor();
  check((await page.locator("figure.chart").count()) === 4, "four charts");
  await page.getByRole("button", { name: "15 min" }).click();
  const burner = await demand("burn");
  const first = page.locator("table.process tbody tr").first();
  await until(`${burner} leads the table`, async () => (await first.locator("th").innerText()).startsWith(burner));
  const sampled = () => page.locator(".processes .moment").getAttribute("data-at").then(Number);
  const since = await sampled();
  // Over a few of the chart's buckets, so that one can be pointed at.
  await until("it burned for fifteen seconds", async () => (await sampled()) - since > 15_000);
  const then = since + 8_000;
  await demand("rest");
  const names = page.locator("table.process tbody th");
  await until("it is gone from the newest table", async () =>
    !(await names.allInnerTexts()).some((name) => name.startsWith(burner)));

  // Back to that moment, with the pointer alone.
  const over = page.locator('[data-chart="mem"] .u-over');
  const began = Date.now();
  await until("the moment under the pointer shows it again", async () => {
    const box = await over.boundingBox();
    const share = 1 - (Date.now() - then) / 900_000;
    await page.mouse.move(box.x + box.width * share - 1, box.y + 30);
    await page.mouse.move(box.x + box.width * share, box.y + 30);
    await page.waitForTimeout(200);
    return (await first.locator("th").innerText()).startsWith(burner);
  });
  figure("page: the table of a past moment under the pointer, ms, with a wait of 200", Date.now() - began);

  // By its address, as a colleague gets it.
  await page.goto(`${url}/vms/${machine}?range=15m&at=${new Date(then).toISOString()}`);
  await until("the address shows that moment", async () => (await first.locator("th").innerText()).startsWith(burner));
  await first.locator("button").click();
  await page.locator('[data-chart="process-cpu"] canvas').waitFor();
  check(page.url().includes(`process=${burner}`), "the address holds the process");
  await page.keyboard.press("Escape");
  await until("Esc lets the moment go", () => !page.url().includes("at="));

  // Zoom by drag, and back.
  const box = await over.boundingBox();
  await page.mouse.move(box.x + box.width * 0.4, box.y + 40);
  await page.mouse.down();
  await page.mouse.move(box.x + box.width * 0.8, box.y + 40, { steps: 4 });
  await page.mouse.up();
  await until("a drag zooms", () => page.url().includes("from="));
  await page.goBack();
  await until("Back zooms out", () => !page.url().includes("from="));

  // The filter, and a click that pins.
  await page.locator('.processes input[type="search"]').fill("vmwatch-agent");
  await until("the filter leaves the agent", async () =>
    (await names.allInnerTexts()).every((name) => name.startsWith("vmwatch-agent")));
  await page.mouse.click(box.x + box.width * 0.98, box.y + 40);
  await until("a click pins", () => page.url().includes("at="));

  // A guest that names its processes so that its table is larger than a message of the bus.
  const hidden = await demand("hide");
  await page.goto(`${url}/vms/${hidden}`);
  await page.locator("button.more").click();
  await until("all thousand are shown", async () => (await page.locator("table.process tbody tr").count()) === 1000);
  check((await first.locator("th").innerText()).startsWith("\u2401"), "control characters are made visible");
});
