# Used as the official nats:…-alpine image is: its entrypoint, its wget.
ARG DEBIAN_IMAGE
FROM ${DEBIAN_IMAGE}
COPY nats-server /usr/local/bin/
RUN ln -s /bin/busybox /usr/local/bin/wget
ENTRYPOINT ["nats-server"]
