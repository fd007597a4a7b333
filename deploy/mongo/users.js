// Creates one database user per service, each for its own database, with MongoDB's built-in roles. The entrypoint of the
// official mongo image runs this script once for an empty database. The role dbAdmin allows collMod, with which metrics-svc
// changes the retention of rows.
const fs = require('fs');

const services = [
  { user: 'vmwatch-auth', secret: 'mongo-auth', database: 'vmwatch_auth', roles: ['readWrite'] },
  { user: 'vmwatch-metrics', secret: 'mongo-metrics', database: 'vmwatch', roles: ['readWrite', 'dbAdmin'] },
  { user: 'vmwatch-alert', secret: 'mongo-alert', database: 'vmwatch_alert', roles: ['readWrite'] },
];

for (const { user, secret, database, roles } of services) {
  const pwd = fs.readFileSync(`/run/secrets/${secret}`, 'utf8').trim();
  db.getSiblingDB(database).createUser({ user, pwd, roles });
}
