// Answers of the REST API about alerts, for stories and screenshots that need no alert-svc.

const MINUTE = 60_000;
const HOUR = 60 * MINUTE;
const began = Date.now();
const ago = (time) => new Date(began - time).toISOString();
const id = (number) => number.toString(16).padStart(32, "0");

const process = (share, name, pid, user, unit, started, more = {}) => ({
  kind: "process", name, pid, started_at: started === null ? null : ago(started), processes: null, user, unit, container: null, command_line: null,
  amount: share * 880, share, exit_code: null, ended_at: null, ...more,
});

const culprits = (processes, more = {}) => ({
  from: ago(20 * MINUTE), to: ago(5 * MINUTE), measure: "cpu", last_known: false, processes, operation: null, problem: null, ...more,
});

const above = (limit, clear) => ({ direction: "above", limit, ...(clear !== undefined && { clear }) });
const measure = (name, limit) => ({ kind: "measure", measure: name, threshold: above(limit) });

const alert = (number, more) => ({
  id: id(number), rule_id: id(100 + number), rule_name: "CPU above 95 %", severity: "critical", condition: measure("cpu_util", 95),
  instance_id: null, vm_name: null, hypervisor: null, labels: {}, subject: "", state: "firing", value: null, since: ago(20 * MINUTE),
  fired_at: ago(5 * MINUTE), acknowledged_at: null, acknowledged_by: null, resolved_at: null, ended_by: null, culprits: null, revision: 2, ...more,
});

const RESTORE = "pg_restore --jobs 4 --dbname=orders --no-owner /var/backups/postgresql/orders-2026-11-26.dump";

/** Alerts of these VMs, each with its id and name. */
export function alertsOf(db, web, off) {
  return [
    alert(1, {
      ...db, value: 97.4, labels: { env: "prod", team: "storage" },
      culprits: culprits([
        process(0.81, "pg_restore", 4121, "postgres", "backup.service", 26 * MINUTE, { command_line: RESTORE }),
        process(0.11, "postgres", 4188, "postgres", "postgresql@15-main.service", 25 * MINUTE),
        process(0.03, "kswapd0", 71, "root", null, 700 * HOUR),
        process(0.02, "nginx", null, "www-data", "nginx.service", null, { kind: "sum", processes: 8 }),
        process(0.01, "vmwatch-agent", 812, "vmwatch", "vmwatch-agent.service", 300 * HOUR),
      ]),
    }),
    alert(2, {
      ...db, rule_name: "Filesystem above 90 %", severity: "warning", condition: { kind: "filesystem", threshold: above(90) },
      subject: "/var/lib/postgresql", value: 93.2, since: ago(3 * HOUR), fired_at: ago(3 * HOUR), state: "acknowledged",
      acknowledged_at: ago(2 * HOUR), acknowledged_by: "ann", revision: 3,
      culprits: culprits([
        process(0.92, "pg_restore", 4121, "postgres", "backup.service", 26 * MINUTE, { amount: 48_000_000, command_line: RESTORE }),
      ], { measure: "disk" }),
    }),
    alert(3, {
      ...web, rule_name: "nginx is missing", condition: { kind: "process_count", name: "nginx", threshold: { direction: "below", limit: 1 } },
      subject: "nginx", value: 0, since: ago(2 * MINUTE), fired_at: ago(MINUTE),
      culprits: culprits([
        process(null, "nginx", 903, "root", "nginx.service", 200 * HOUR, { amount: 0, exit_code: 139, ended_at: ago(2 * MINUTE) }),
      ]),
    }),
    alert(4, {
      ...off, rule_name: "Agent silent", severity: "warning", condition: { kind: "agent_silent" }, since: ago(9 * MINUTE), fired_at: ago(4 * MINUTE),
      culprits: culprits([
        process(0.62, "java", 1120, "10001", null, 90 * HOUR, { container: "shop/orders-7d9c/orders" }),
        process(0.08, "containerd", 611, "root", "containerd.service", 400 * HOUR),
      ], { last_known: true, operation: { operation_id: "1", action: "reboot", user: "bob" } }),
    }),
    alert(5, {
      rule_name: "vmwatch is not receiving samples", condition: { kind: "not_receiving" }, severity: "info", since: ago(MINUTE), fired_at: ago(MINUTE),
    }),
    alert(6, {
      ...web, rule_name: "VM is off", severity: "warning", condition: { kind: "vm_state", states: ["shut_off", "crashed"] }, state: "resolved",
      hypervisor: "lab", subject: "lab", since: ago(50 * MINUTE), fired_at: ago(50 * MINUTE), resolved_at: ago(35 * MINUTE),
      ended_by: { operation_id: "2", action: "start", user: "ann" }, revision: 3,
      culprits: culprits([], { operation: { operation_id: "3", action: "stop", user: "bob" } }),
    }),
    alert(7, {
      ...db, state: "resolved", value: 71.2, since: ago(44 * MINUTE), fired_at: ago(40 * MINUTE), resolved_at: ago(31 * MINUTE),
      culprits: culprits([process(0.55, "vacuumdb", 3911, "postgres", "vacuum.service", 50 * MINUTE)]), revision: 3,
    }),
  ];
}

const rule = (number, name, severity, condition, for_seconds, more = {}, spec = {}) => ({
  id: id(number), revision: 1, changed_by: "", changed_at: ago(900 * HOUR), problem: null, active: 0, ...more,
  spec: { name, enabled: true, condition, for_seconds, severity, vms: {}, recipients: [], ...spec },
});

const MAIL = id(201);
const HOOK = id(202);

export const rules = [
  rule(104, "Agent silent", "warning", { kind: "agent_silent" }, 300, { active: 1 }),
  rule(101, "CPU above 95 %", "critical", { kind: "measure", measure: "cpu_util", threshold: above(95, 90) }, 900, { active: 1, changed_by: "ann", changed_at: ago(HOUR), revision: 4 }, {
    vms: { labels: ["env=prod"], name: "db-*" }, recipients: [MAIL, HOOK],
  }),
  rule(102, "Filesystem above 90 %", "warning", { kind: "filesystem", threshold: above(90) }, 0, { active: 1 }),
  rule(110, "Filesystem above 97 %", "critical", { kind: "filesystem", threshold: above(97) }, 0),
  rule(111, "Memory above 95 %", "critical", measure("mem", 95), 600),
  rule(103, "nginx is missing", "critical", { kind: "process_count", name: "nginx", threshold: { direction: "below", limit: 1 } }, 60, { active: 1, changed_by: "bob" }, {
    vms: { labels: ["role=web"] }, recipients: [HOOK],
  }),
  rule(112, "Operation failed", "warning", { kind: "operation_failed" }, 0),
  rule(106, "VM is off", "warning", { kind: "vm_state", states: ["shut_off", "crashed"] }, 0, {
    problem: "the hypervisor lab has not been listed for 10 minutes", changed_by: "bob",
  }, { vms: { labels: ["keep=on"] }, enabled: false }),
];

export const silences = [
  {
    id: id(301), matchers: { rule: "Filesystem above 90 %", vm_name: "db-1" }, from: ago(HOUR), to: ago(-3 * HOUR),
    comment: "The disk is enlarged tonight, CHG-1042", created_by: "ann", created_at: ago(HOUR),
  },
  { id: id(302), matchers: { env: "test" }, from: ago(-12 * HOUR), to: ago(-20 * HOUR), comment: "", created_by: "bob", created_at: ago(2 * HOUR) },
  { id: id(303), matchers: { hypervisor: "lab" }, from: ago(30 * HOUR), to: ago(26 * HOUR), comment: "Firmware", created_by: "bob", created_at: ago(31 * HOUR) },
];

const channel = (number, name, target, more = {}, spec = {}) => ({
  id: id(number), revision: 1, has_secret: true, changed_by: "admin", changed_at: ago(40 * HOUR), waiting: 0, delivered_at: ago(4 * MINUTE),
  problem: null, ...more, spec: { name, enabled: true, target, group_by: ["vm"], group_wait_seconds: 10, repeat_seconds: 14_400, ...spec },
});

export const channels = [
  channel(203, "Alertmanager of the platform team", { kind: "alertmanager", url: "http://10.0.0.5:9093" }, { has_secret: false, delivered_at: null }, { enabled: false }),
  channel(202, "On-call webhook", { kind: "webhook", url: "https://hooks.example.com/services/T024/B0XYZ" }, {
    waiting: 3, problem: "the receiver answered 503 Service Unavailable", delivered_at: ago(50 * MINUTE),
  }),
  channel(201, "Operations", {
    kind: "email", server: "mail.example.com:587", tls: "starttls", from: "vmwatch@example.com", to: ["ops@example.com", "dba@example.com"], user: "vmwatch",
  }),
];

export const channelNames = channels.map(({ id, spec }) => ({ id, name: spec.name, kind: spec.target.kind, enabled: spec.enabled }));

const message = (number, channel_id, purpose, more) => ({
  id: id(number), channel_id, purpose, group: { vm: "db-1" }, alerts: [{ id: id(1), state: "firing" }], created_at: ago(4 * MINUTE), next_attempt_at: null,
  delivered_at: ago(4 * MINUTE), tries: 1, attempts: [{ at: ago(4 * MINUTE), took_ms: 212, delivered: true, answer: "250 2.0.0 Ok: queued as 4F1" }],
  ...more,
});

const refused = (minutes) => ({ at: ago(minutes * MINUTE), took_ms: 95, delivered: false, answer: "503 Service Unavailable: upstream is restarting" });

export const messages = [
  message(401, MAIL, "change", {}),
  message(402, HOOK, "change", { delivered_at: null, next_attempt_at: ago(-MINUTE), tries: 3, attempts: [refused(4), refused(3), refused(1)] }),
  message(403, MAIL, "test", { group: {}, alerts: [], created_at: ago(3 * HOUR) }),
  message(404, MAIL, "repeat", { created_at: ago(5 * HOUR), alerts: [{ id: id(2), state: "firing" }, { id: id(7), state: "resolved" }] }),
];

export const preview = (db, web) => ({
  from: ago(168 * HOUR), to: ago(0), step_ms: 5 * MINUTE, evaluated: 50, selected: 64, limitation: null,
  unread: { "the history is unavailable": 2 },
  vms: [
    {
      ...db,
      firing: [[150, 149, 98.1], [126, 125.2, 97], [102, 101, 99.6], [78, 77.5, 96.4], [30, 28, 99.9], [6, 5.8, 95.9]].map(([from, to, peak]) =>
        ({ from: ago(from * HOUR), to: ago(to * HOUR), peak })),
    },
    { ...web, firing: [{ from: ago(51 * HOUR), to: ago(50.6 * HOUR), peak: 96.2 }] },
  ],
});

/** Serves these answers to a page instead of the gateway. Returns the alerts, which the story may change. */
export async function stubAlerts(page, { alerts, previewed, hasRecipients = true }) {
  const state = { alerts, hasRecipients, requests: [] };
  const json = (route, body) => route.fulfill({ json: body });
  const one = (address) => new URL(address).pathname.split("/")[4];
  await page.route(/\/api\/v1\/alerts(\?|\/|$)/, (route) => {
    const request = route.request();
    const query = new URL(request.url()).searchParams;
    state.requests.push(`${request.method()} ${request.url()}`);
    const found = state.alerts.find((alert) => alert.id === one(request.url()));
    if (request.method() === "PUT") {
      Object.assign(found, { state: "acknowledged", acknowledged_at: new Date().toISOString(), acknowledged_by: "admin", revision: found.revision + 1 });
      return json(route, found);
    }
    if (one(request.url())) {
      return found ? json(route, found) : route.fulfill({ status: 404, json: { type: "about:blank", title: "Not Found", status: 404, code: "not_found", detail: "", request_id: "1" } });
    }
    const selected = state.alerts.filter((alert) =>
      (query.has("state") ? alert.state === query.get("state") : alert.state !== "resolved")
      && (!query.has("severity") || alert.severity === query.get("severity"))
      && (!query.has("instance_id") || alert.instance_id === query.get("instance_id")));
    return json(route, { alerts: selected, next: null, active: { info: 0, warning: 0, critical: 0 }, has_recipients: state.hasRecipients });
  });
  await page.route(/\/api\/v1\/alert-rules\/preview/, (route) => json(route, previewed));
  await page.route(/\/api\/v1\/alert-rules(\/[0-9a-f]{32})?$/, (route) => {
    const known = one(route.request().url());
    if (route.request().method() !== "GET") {
      state.requests.push(`${route.request().method()} ${route.request().postData()}`);
      return json(route, rules[0]);
    }
    return json(route, known ? rules.find((rule) => rule.id === known) : { rules, unreadable: [] });
  });
  await page.route(/\/api\/v1\/alert-silences/, (route) => {
    if (route.request().method() === "GET") return json(route, { silences });
    state.requests.push(`${route.request().method()} ${route.request().postData()}`);
    return json(route, silences[0]);
  });
  await page.route(/\/api\/v1\/alert-channels\/names/, (route) => json(route, { channels: channelNames }));
  await page.route(/\/api\/v1\/alert-channels(\/[0-9a-f]{32}(\/test)?)?(\?.*)?$/, (route) => {
    if (route.request().method() === "GET") return json(route, { channels, has_key: false });
    state.requests.push(`${route.request().method()} ${route.request().postData()}`);
    return json(route, channels[0]);
  });
  await page.route(/\/api\/v1\/alert-messages/, (route) => {
    const query = new URL(route.request().url()).searchParams;
    const of = (message) => !query.has("channel_id") || message.channel_id === query.get("channel_id");
    return json(route, { messages: messages.filter(of), next: null });
  });
  return state;
}
