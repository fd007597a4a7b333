// Baseline of `./dev bench`: a Node gateway, which sends one NATS request to the Node service for each HTTP request and
// returns the rows of the reply.
"use strict";

const http = require("node:http");
const { connect } = require("@nats-io/transport-node");

const METHODS = new Map([
  [611611, { subject: "baseline.vm.latest", message: "'success query vm information'" }],
  [611711, { subject: "baseline.process.latest", message: "'success query proc information'" }],
]);
// The valid session ids. A real gateway would read them from a store.
const SESSIONS = new Set([process.env.BASELINE_SESSION]);
const DEADLINE_MS = 5000;

async function answer(bus, request) {
  const { method, session_id, data, limit } = request;
  const envelope = (status_code, message, rows) => ({
    status_code, session_id, message_id: "", message, data: rows, method,
  });
  if (!SESSIONS.has(session_id)) {
    return envelope(3, "'invalid or expired session'", null);
  }
  const { subject, message } = METHODS.get(method);
  const instance_id = data.instance_id.replace(/[;\s]+$/, "");
  const reply = await bus.request(subject, JSON.stringify({ instance_id, limit }), { timeout: DEADLINE_MS });
  return envelope(1, message, reply.json());
}

async function main() {
  const bus = await connect({ servers: process.env.BASELINE_NATS });
  const server = http.createServer((request, response) => {
    const chunks = [];
    request.on("data", (chunk) => chunks.push(chunk));
    request.on("end", async () => {
      let status = 200;
      let body;
      try {
        body = JSON.stringify(await answer(bus, JSON.parse(Buffer.concat(chunks))));
      } catch (error) {
        status = 503;
        body = JSON.stringify({ error: error.message });
      }
      response.writeHead(status, { "Content-Type": "application/json", "Content-Length": Buffer.byteLength(body) });
      response.end(body);
    });
  });
  server.listen(Number(process.env.BASELINE_PORT), "127.0.0.1");
}

main();
