// Run once by the official image's entrypoint, when it makes a new store: one user a service, each for its own
// database, with MongoDB's built-in roles. dbAdmin is for collMod, which changes how long rows are kept.
const fs = require('fs');

const services = [
  { user: 'vmwatch-auth', secret: 'mongo-auth', database: 'vmwatch_auth', roles: ['readWrite'] },
  { user: 'vmwatch-metrics', secret: 'mongo-metrics', database: 'vmwatch', roles: ['readWrite', 'dbAdmin'] },
];

for (const { user, secret, database, roles } of services) {
  const pwd = fs.readFileSync(`/run/secrets/${secret}`, 'utf8').trim();
  db.getSiblingDB(database).createUser({ user, pwd, roles });
}
