// Story: an operator sees that two hypervisors have a VM, chooses the hypervisor of an action, and learns why other actions
// are not allowed.
import { accessible, admin, check, setting, signIn, story, until, url } from "./browser.mjs";

const [disputed, locked] = setting("VMWATCH_PAGE_MACHINES").split(",");
const shots = process.env.VMWATCH_PAGE_SHOTS;

await story(async (page, { faults }) => {
  await signIn(page, admin);
  const shot = async (name) => {
    if (shots) await page.screenshot({ path: `${shots}/${name}.png` });
  };
  const row = page.locator(`tr[data-vm="${disputed}"]`);
  await row.locator(".badge.warn", { hasText: "conflict" }).waitFor();
  check((await row.locator("td.act button").count()) === 0, "a VM that two hypervisors have has no start button");
  const title = await row.locator("a").getAttribute("title");
  check(title.includes("a (running)") && title.includes("b (shut off)"), `both states are shown: ${title}`);
  const start = page.locator(`tr[data-vm="${locked}"] td.act button`);
  check(await start.isDisabled(), "a locked VM cannot be started");
  check((await start.getAttribute("title")).includes("locked"), "the reason is shown");
  await shot("conflict-list");
  await accessible(page, "the list", faults);

  await page.goto(`${url}/vms/${locked}`);
  await page.locator(".actions .reason", { hasText: "Unlock it there first." }).waitFor();
  await shot("locked-vm");

  await page.goto(`${url}/vms/${disputed}`);
  await page.getByText("Several hypervisors have this VM: a (running), b (shut off).").waitFor();
  const copies = page.locator(".actions select.copies");
  const more = page.locator(".actions select.more");
  const primary = page.locator(".actions button.primary");
  check((await copies.inputValue()) === "a", "the first hypervisor is chosen");
  check((await primary.count()) === 0, "a running VM is not started");
  await copies.selectOption("b");
  await page.locator(".actions .reason", { hasText: "not off on another hypervisor" }).waitFor();
  check(await primary.isDisabled(), "a second copy cannot be started");
  const stop = await more.locator('option[value="stop"]').innerText();
  check(stop.includes("off already"), `the reason is in the menu: ${stop}`);
  await shot("conflict-vm");
  await accessible(page, "the VM", faults);

  // Shut it down on a, and start it on b.
  await copies.selectOption("a");
  await more.selectOption("stop");
  await page.locator("dialog", { hasText: "Hypervisor: a" }).locator("button.danger").click();
  await page.getByText("Several hypervisors have this VM: a (shut off), b (shut off).").waitFor();
  await copies.selectOption("b");
  await until("the VM can be started on b", async () => (await primary.count()) === 1 && (await primary.isEnabled()));
  await primary.click();
  await page.getByText("Several hypervisors have this VM: a (shut off), b (running).").waitFor();

  await page.locator(".account summary").click();
  await page.getByRole("button", { name: "中文" }).click();
  await page.getByText("多个虚拟化平台拥有此虚拟机").waitFor();
  await shot("conflict-vm-zh");
});
