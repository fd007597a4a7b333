# Replaces the official nats:…-alpine image in tests, with the same entrypoint and wget.
ARG DEBIAN_IMAGE
FROM ${DEBIAN_IMAGE}
COPY nats-server /usr/local/bin/
RUN ln -s /bin/busybox /usr/local/bin/wget
ENTRYPOINT ["nats-server"]
