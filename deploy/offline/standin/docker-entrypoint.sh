#!/bin/bash
# Does the same as the entrypoint of the official mongo image. At the first start it starts a server without users on
# loopback, adds the root user, and runs the scripts in /docker-entrypoint-initdb.d. Then it starts the server for
# clients, which requires passwords. Without a root user there is no access control, as in the official image. Of
# mongod's options, it supports only those for TLS.
set -euo pipefail

arguments=(--port 27017 --storage-path /data/db --standalone --sync-on-commit --cache-size 256M --log-file-max 16MB)
tls=()
while [ $# -gt 0 ]; do
    case $1 in
        # The file contains both the certificate and the key.
        --tlsCertificateKeyFile) tls=(--tls-cert-file "$2" --tls-key-file "$2"); shift 2 ;;
        --tlsMode | --tlsCAFile) shift 2 ;;
        mongod | --tlsAllowConnectionsWithoutCertificates) shift ;;
        *) echo "the stand-in does not support the option $1" >&2; exit 64 ;;
    esac
done

if [ -z "${MONGO_INITDB_ROOT_USERNAME:-}" ]; then
    exec database --host 0.0.0.0 "${arguments[@]}" "${tls[@]}"
fi

if [ ! -e /data/db/.prepared ]; then
    database --host 127.0.0.1 "${arguments[@]}" &
    server=$!
    until (exec 3<>/dev/tcp/127.0.0.1/27017) 2>/dev/null; do
        kill -0 "$server"
        sleep 0.1
    done
    MONGO_ROOT_PASSWORD=$(<"$MONGO_INITDB_ROOT_PASSWORD_FILE") mongosh --host 127.0.0.1 --quiet admin --eval \
        'db.createUser({ user: process.env.MONGO_INITDB_ROOT_USERNAME, pwd: process.env.MONGO_ROOT_PASSWORD,
            roles: [{ role: "root", db: "admin" }] })'
    for script in /docker-entrypoint-initdb.d/*.js; do
        mongosh --host 127.0.0.1 --port 27017 --quiet test "$script"
    done
    kill -TERM "$server"
    wait "$server" || true
    touch /data/db/.prepared
fi

exec database --host 0.0.0.0 --auth "${arguments[@]}" "${tls[@]}"
