# The service's image: one static binary, CA certificates and nothing else, run by a user without rights.
#
#   docker build -t ordersaga .
#
# On a machine that can pull no base image, `make images` makes the same image of a binary built on the host
# (deploy/Dockerfile.prebuilt); change both files together.
ARG GO_VERSION=1.26

FROM golang:${GO_VERSION}-bookworm AS build
WORKDIR /src
# Dependencies first: they change less often than the code, and this layer is then kept.
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION=unknown
RUN CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=${VERSION}" -o /out/ordersaga ./cmd/ordersaga

FROM scratch
# For TLS to Kafka, Postgres and the payment gateway.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /out/ordersaga /ordersaga
LABEL org.opencontainers.image.title="ordersaga" org.opencontainers.image.licenses="Apache-2.0"
# A number, so that Kubernetes' runAsNonRoot can see that it is not root. Nothing is written to the file system.
USER 65532:65532
EXPOSE 8080
ENV ORDERSAGA_HTTP_ADDR=:8080
# The binary asks itself: there is no shell here. Alive is what counts (/healthz); readiness (/readyz) is for whoever routes traffic.
HEALTHCHECK --interval=5s --timeout=3s --start-period=20s --retries=5 CMD ["/ordersaga", "healthcheck"]
# Time to drain after SIGTERM is the orchestrator's to give: stop_grace_period, terminationGracePeriodSeconds.
STOPSIGNAL SIGTERM
ENTRYPOINT ["/ordersaga"]
CMD ["serve"]
