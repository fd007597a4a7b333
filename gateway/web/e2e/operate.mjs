// Story: an operator can start a VM and label it, and an administrator can remove one; a viewer can do neither.
import { admin, check, setting, signIn, story, until, url } from "./browser.mjs";

const [off, another] = setting("VMWATCH_PAGE_MACHINES").split(",");
const viewer = { user: "vera", password: "a viewer's password" };

await story(async (page) => {
  await signIn(page);
  const row = page.locator(`tr[data-vm="${off}"]`);
  await row.locator("td.act button").click();
  await until("the VM is running", async () => (await row.locator("td.state .badge.good").count()) === 1);
  await until("the start button of the running VM disappears", async () => (await row.locator("td.act button").count()) === 0);

  // The operation must be listed with its steps, and it must be in the audit log.
  await page.locator('a[href="/operations"]').click();
  const card = page.locator("details.operation", { hasText: off }).first();
  await card.locator(".badge.good").waitFor();
  await card.locator("summary strong").click();
  check((await card.locator(".steps li").count()) >= 2, "the steps of the operation are listed");
  await page.locator('a[href="/audit"]').click();
  await page.locator("table.records tr", { hasText: off }).first().waitFor();

  await keepsPagesApart(page);

  // Forcing a VM off requires confirmation.
  await page.goto(`${url}/vms/${off}`);
  await page.locator(".actions select").selectOption("force-stop");
  await page.locator("dialog button.danger").click();
  await page.locator("header.vm .operation").waitFor();
  await until("the VM is shut off", async () => (await page.locator("header.vm .heading .badge.quiet").count()) >= 1);
  await page.locator(".actions button.primary").waitFor();

  await labels(page);
  await removes(page);

  // Create a user with the role viewer who may see one VM.
  await page.locator('a[href="/users"]').click();
  await page.locator(".heading button.primary").click();
  await page.locator('dialog input[name="name"]').fill(viewer.user);
  await page.locator('dialog input[name="password"]').fill(viewer.password);
  await page.locator('dialog input[value="only"]').check();
  await page.locator('dialog textarea[name="ids"]').fill(another);
  await page.locator('dialog button[type="submit"]').click();
  await page.locator(`tr[data-user="${viewer.user}"]`).waitFor();
  await page.locator(".account summary").click();
  await page.locator(".account .sheet button", { hasText: "Sign out" }).click();

  await signIn(page, viewer);
  await page.locator(`tr[data-vm="${another}"]`).waitFor();
  check((await page.locator("table.vms tbody tr").count()) === 1, "the viewer sees only the VM in their scope");
  check((await page.locator("td.act").count()) === 0, "a viewer has no start button");
  check((await page.locator('a[href="/audit"]').count()) === 0, "a viewer has no link to the audit log");
  await page.locator(`tr[data-vm="${another}"] a`).click();
  await page.getByText("Controlling VMs requires the operator role.").waitFor();
  check((await page.locator("header.vm .manage button").count()) === 0, "a viewer can neither edit labels nor remove a VM");
  await page.goto(`${url}/vms/${off}`);
  await page.getByText("VM not found").waitFor();
  await page.goto(`${url}/users`);
  await page.getByText("Your role does not allow this").waitFor();

  // Deleting a user must sign out the web page that the user has open.
  const { context } = { context: page.context() };
  await page.goto(url);
  await page.locator("header.top").waitFor();
  const second = await (await context.browser().newContext({ locale: "en-GB" })).newPage();
  await signIn(second, admin, "/users");
  await second.locator(`tr[data-user="${viewer.user}"] button`).last().click();
  await second.locator("dialog button.danger").click();
  await page.locator('input[name="password"]').waitFor();
});

/** Labels are added, changed and removed; those of the hypervisor are shown and cannot be edited. */
async function labels(page) {
  const shown = page.locator(".labels li");
  const rows = page.locator("dialog .label-row");
  const save = () => page.locator('dialog button[type="submit"]').click();
  const shows = (expected) =>
    until(`the labels ${expected} are shown`, async () => (await shown.allInnerTexts()).join() === expected);
  await shows("hv/title=Ledger");
  await page.locator(".labels > button").click();
  check((await rows.count()) === 1, "the label of the hypervisor is not in the dialog");
  await rows.getByLabel("Key").fill("team");
  await rows.getByLabel("Value").fill("storage");
  await page.locator(".label-rows > button").click();
  await rows.nth(1).getByLabel("Key").fill("hv/mine");
  await save();
  await page.locator("dialog .problem", { hasText: "not begin with hv/" }).waitFor();
  await rows.nth(1).getByLabel("Key").fill("rack");
  await save();
  await shows("rack,team=storage,hv/title=Ledger");

  // A change by another user is not overwritten.
  await page.locator(".labels > button").click();
  await rows.nth(1).getByLabel("Value").fill("network");
  const changed = await page.evaluate(async (path) => {
    const { labels, revision } = await (await fetch(path)).json();
    const body = JSON.stringify({ labels: { ...labels, owner: "ann" }, revision });
    return (await fetch(path, { method: "PUT", body, headers: { "Content-Type": "application/json" } })).status;
  }, `/api/v1/vms/${off}/labels`);
  check(changed === 200, "the other user changes the labels");
  await save();
  await page.locator("dialog .problem", { hasText: "Another user has changed the labels" }).waitFor();
  await page.keyboard.press("Escape");
  await shows("owner=ann,rack,team=storage,hv/title=Ledger");
  await page.locator(".labels > button").click();
  await rows.nth(1).locator("button").click();
  await save();
  await shows("owner=ann,team=storage,hv/title=Ledger");
}

/** A VM that a hypervisor has cannot be removed; another one can, by its name. */
async function removes(page) {
  const name = page.locator('dialog input[name="name"]');
  const submit = page.locator("dialog button.danger");
  await page.locator(".remove-vm").click();
  await name.fill((await page.locator("main h1").innerText()).trim());
  await submit.click();
  await page.locator("dialog .problem", { hasText: "still has this VM" }).waitFor();
  await page.goto(`${url}/vms/decommissioned`);
  await page.locator(".remove-vm").click();
  await name.fill("decommissione");
  await submit.click();
  check(await name.evaluate((input) => !input.validity.valid), "a wrong name is not sent");
  await name.fill("decommissioned");
  await submit.click();
  await page.locator("table.vms tbody tr").first().waitFor();
  await page.goto(`${url}/vms/decommissioned`);
  await page.getByText("VM not found").waitFor();
  await page.goto(`${url}/vms/${off}`);
}

/** A further page that arrives after the filter was changed is not appended to the records of the new filter. */
async function keepsPagesApart(page) {
  const record = (user) => ({
    at: "2026-01-01T00:00:00.000Z", user, action: "auth.login", result: "succeeded", request_id: user, detail: "",
  });
  let release;
  const released = new Promise((resolve) => (release = resolve));
  await page.route("**/api/v1/audit?**", async (route) => {
    const query = new URL(route.request().url()).searchParams;
    const isFurther = query.has("before");
    if (isFurther) await released;
    const user = `${query.get("user") ?? "anyone"} ${isFurther ? "earlier" : "latest"}`;
    await route.fulfill({ json: { records: [record(user)], next: isFurther ? null : "next" } }).catch(() => undefined);
  });
  await page.goto(`${url}/audit`);
  const users = page.locator("table.records td.user");
  await users.getByText("anyone latest").waitFor();
  const requested = page.waitForRequest((request) => request.url().includes("before="));
  await page.locator("button.more").click();
  await requested;
  await page.getByLabel("User", { exact: true }).fill("ann");
  await page.keyboard.press("Enter");
  await users.getByText("ann latest").waitFor();
  release();
  await page.unrouteAll({ behavior: "wait" });
  check((await users.allInnerTexts()).join() === "ann latest", "the page of the old filter is not appended");
}
