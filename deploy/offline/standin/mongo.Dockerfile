# Replaces the official mongo image in tests. It supports the same entrypoint with MONGO_INITDB_ROOT_…,
# /docker-entrypoint-initdb.d and mongosh, but the server is a stand-in for MongoDB.
ARG DEBIAN_IMAGE
FROM ${DEBIAN_IMAGE}
ADD mongosh.tar /opt/mongosh/
COPY database docker-entrypoint.sh /usr/local/bin/
RUN printf '#!/bin/sh\nexec /opt/mongosh/node /opt/mongosh/node_modules/.bin/mongosh "$@"\n' >/usr/local/bin/mongosh \
    && chmod 0755 /usr/local/bin/mongosh /usr/local/bin/docker-entrypoint.sh \
    && useradd --system --uid 999 --home-dir /data/db mongodb \
    && mkdir --parents /data/db && chown mongodb /data/db
ENV HOME=/data/db
ENTRYPOINT ["docker-entrypoint.sh"]
