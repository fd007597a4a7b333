// Starting a VM and seeing it run; and who may not.
import { admin, check, setting, signIn, story, until, url } from "./browser.mjs";

const [off, another] = setting("VMWATCH_PAGE_MACHINES").split(",");
const viewer = { user: "vera", password: "a viewer's password" };

await story(async (page) => {
  await signIn(page);
  const row = page.locator(`tr[data-vm="${off}"]`);
  await row.locator("td.act button").click();
  await until("it runs", async () => (await row.locator("td.state .badge.good").count()) === 1);
  await until("there is nothing to start any more", async () => (await row.locator("td.act button").count()) === 0);

  // Its record, with its steps, and the audit's.
  await page.locator('a[href="/operations"]').click();
  const card = page.locator("details.operation", { hasText: off }).first();
  await card.locator(".badge.good").waitFor();
  await card.locator("summary strong").click();
  check((await card.locator(".steps li").count()) >= 2, "its steps are told");
  await page.locator('a[href="/audit"]').click();
  await page.locator("table.records tr", { hasText: off }).first().waitFor();

  // The power is cut only after a question.
  await page.goto(`${url}/vms/${off}`);
  await page.locator(".actions select").selectOption("force-stop");
  await page.locator("dialog button.danger").click();
  await page.locator("header.vm .operation").waitFor();
  await until("it is off", async () => (await page.locator("header.vm .heading .badge.quiet").count()) >= 1);
  await page.locator(".actions button.primary").waitFor();

  // A viewer of one VM, made on the page.
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
  check((await page.locator("table.vms tbody tr").count()) === 1, "the viewer sees its VM alone");
  check((await page.locator("td.act").count()) === 0, "a viewer has nothing to start with");
  check((await page.locator('a[href="/audit"]').count()) === 0, "nor a way to the audit");
  await page.locator(`tr[data-vm="${another}"] a`).click();
  await page.getByText("Controlling VMs requires the operator role.").waitFor();
  await page.goto(`${url}/vms/${off}`);
  await page.getByText("VM not found").waitFor();
  await page.goto(`${url}/users`);
  await page.getByText("Your role does not allow this").waitFor();

  // An administrator takes the viewer away; its page is at the sign-in within moments.
  const { context } = { context: page.context() };
  await page.goto(url);
  await page.locator("header.top").waitFor();
  const second = await (await context.browser().newContext({ locale: "en-GB" })).newPage();
  await signIn(second, admin, "/users");
  await second.locator(`tr[data-user="${viewer.user}"] button`).last().click();
  await second.locator("dialog button.danger").click();
  await page.locator('input[name="password"]').waitFor();
});
