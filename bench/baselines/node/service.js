// Baseline of `./dev bench`: a Node service, which answers NATS requests with rows from MongoDB.
"use strict";

const { connect } = require("@nats-io/transport-node");
const { Double, MongoClient, ObjectId } = require("mongodb");

const VM_KEYS = [
  "net_incoming", "disk_write", "mem", "net_outgoing", "instance_id", "cpu_util", "disk_read", "create_date", "_id",
  "proc",
];
const PROCESS_KEYS = [
  "net_incoming", "shutdown_time", "mem", "net_outgoing", "cmd", "pid", "instance_id", "disk_write", "disk_read",
  "create_date", "_id", "cpu_util", "running_time",
];
const ENDPOINTS = [
  { subject: "baseline.vm.latest", collection: "baseline_vm_samples", keys: VM_KEYS },
  { subject: "baseline.process.latest", collection: "baseline_process_samples", keys: PROCESS_KEYS },
];

// Formats a row like the `repr` of a Python 2 dictionary, with its keys in the given order.
function rowText(row, keys) {
  return `{${keys.map((key) => `u'${key}': ${valueText(row[key])}`).join(", ")}}`;
}

function valueText(value) {
  if (value === null || value === undefined) return "None";
  if (typeof value === "string") return `u${pythonText(value)}`;
  if (value instanceof Double) return pythonFloat(value.value);
  if (value instanceof ObjectId) return `ObjectId('${value.toHexString()}')`;
  return String(value);
}

function pythonText(text) {
  const quote = text.includes("'") && !text.includes('"') ? '"' : "'";
  const escaped = text.replace(/[\\'"]|[^ -~]/gu, (c) => {
    if (c === "\\" || c === quote) return `\\${c}`;
    if (c === "'" || c === '"') return c;
    if (c === "\n") return "\\n";
    if (c === "\r") return "\\r";
    if (c === "\t") return "\\t";
    const code = c.codePointAt(0);
    if (code <= 0xff) return `\\x${code.toString(16).padStart(2, "0")}`;
    if (code <= 0xffff) return `\\u${code.toString(16).padStart(4, "0")}`;
    return `\\U${code.toString(16).padStart(8, "0")}`;
  });
  return quote + escaped + quote;
}

function pythonFloat(number) {
  if (!Number.isFinite(number)) return "None";
  const size = Math.abs(number);
  if (size !== 0 && (size < 1e-4 || size >= 1e16)) {
    return number.toExponential().replace(/e([+-])(\d)$/, "e$10$2");
  }
  const text = String(number);
  return Number.isInteger(number) ? `${text}.0` : text;
}

async function main() {
  // Values are not promoted to JavaScript numbers, so that doubles and integers can be distinguished (0.0 and 0).
  const client = await MongoClient.connect(process.env.BASELINE_MONGODB, { promoteValues: false });
  const database = client.db("vmwatch");
  const bus = await connect({ servers: process.env.BASELINE_NATS });
  for (const { subject, collection, keys } of ENDPOINTS) {
    bus.subscribe(subject, {
      queue: "baseline",
      callback: async (error, message) => {
        if (error) throw error;
        const { instance_id, limit } = message.json();
        const newest = database.collection(collection).find({ instance_id });
        const rows = await newest.sort({ create_date: -1, _id: -1 }).limit(limit).toArray();
        message.respond(JSON.stringify(rows.map((row) => rowText(row, keys))));
      },
    });
  }
}

main();
