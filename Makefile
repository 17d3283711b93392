# ordersaga: what a developer and CI run. `make` alone lists the targets.
#
# Everything a target needs beyond Go itself is pinned in tools/, tools/lint/ or tools/oasdiff/ and built into .build/bin on
# first use; `make test` finds or starts its own Postgres and Kafka (CONTRIBUTING.md says how it chooses).

SHELL       := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS   += --no-builtin-rules
.DEFAULT_GOAL := help

BUILD := .build
BIN   := $(abspath $(BUILD)/bin)
GO    ?= go

# What is tested, linted and measured. Narrow it: make test PKG=./saga/...
PKG ?= ./...
# Handed to the subcommand: make dev ARGS='--demo 200 --exit'
ARGS ?=

VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS  := -s -w -X main.version=$(VERSION)
IMAGE    ?= ordersaga:dev

# The race detector needs a C compiler. CI must have one; elsewhere a machine without one still gets its tests run, and is told.
RACE := $(if $(or $(CI),$(shell command -v $${CC:-cc} 2>/dev/null)),-race,)
# CI hands in gotestsum here, which runs the same `go test` and keeps a machine-readable record beside it.
GOTEST    ?= $(GO) test
TESTFLAGS ?=
# Two packages at a time: several of them run a Postgres and a Kafka of their own.
TESTPAR   ?= 2

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  \033[1m%-14s\033[0m %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

## Run ---------------------------------------------------------------------------------------------------------------------

.PHONY: dev
dev: ## Run everything in one process on an embedded broker and a private Postgres (ARGS='--demo 200 --exit')
	$(GO) run ./cmd/ordersaga dev $(ARGS)

.PHONY: build
build: $(BUILD)/ordersaga ## Build the static binary into .build/ordersaga

# Phony by way of FORCE: go decides what is stale, and it knows better than file times.
$(BUILD)/ordersaga: FORCE
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $@ ./cmd/ordersaga

.PHONY: images
images: $(BUILD)/ordersaga ## Build the image ordersaga:dev, also where no base image can be pulled (IMAGE=name:tag)
	@rm -rf $(BUILD)/image && mkdir -p $(BUILD)/image
	@cp $(BUILD)/ordersaga $(BUILD)/image/
	@for ca in $${SSL_CERT_FILE:-} /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/cert.pem; do \
	  if [ -s "$$ca" ]; then cp -L "$$ca" $(BUILD)/image/ca-certificates.crt; break; fi; done; \
	  [ -s $(BUILD)/image/ca-certificates.crt ] || { echo "images: no CA bundle found on this machine; install ca-certificates or set SSL_CERT_FILE" >&2; exit 1; }
	docker build -q -t $(IMAGE) -f deploy/Dockerfile.prebuilt $(BUILD)/image

.PHONY: compose-up
compose-up: images ## Start Kafka, Postgres, the gateway simulator and the service by docker compose, and wait until they are healthy
	docker compose up -d --wait --wait-timeout 180 $(ARGS)
	@docker compose ps

.PHONY: compose-down
compose-down: ## Stop what compose-up started; the volumes stay (ARGS=-v removes them, and the orders with them)
	docker compose --profile '*' down $(ARGS)

## Test --------------------------------------------------------------------------------------------------------------------

.PHONY: test
test: ## Run every test, on a real Postgres and a real Kafka too, with the race detector (PKG=./saga/... TESTFLAGS='-run X')
	@[ -n "$(RACE)" ] || echo "make test: no C compiler here, so the race detector is off (install gcc or clang)" >&2
	$(GOTEST) $(RACE) -shuffle=on -timeout 20m -p $(TESTPAR) $(TESTFLAGS) $(PKG)

.PHONY: test-race
test-race: ## Hunt data races: the tests several times over, each time in another order and on 1, 2 and 4 threads (COUNT=2)
	$(GO) test -race -shuffle=on -count=$(or $(COUNT),2) -cpu 1,2,4 -timeout 60m -p $(TESTPAR) $(TESTFLAGS) $(PKG)

FUZZTIME ?= 10s
.PHONY: fuzz
fuzz: ## Fuzz every fuzz target for FUZZTIME each (10s)
	@.ci/fuzz '$(FUZZTIME)'

.PHONY: bench
bench: ## Run the Go benchmarks; compares with the run before (PKG=./outbox/... BENCH=Relay COUNT=6)
	@mkdir -p $(BUILD)
	@[ ! -s $(BUILD)/bench.txt ] || mv $(BUILD)/bench.txt $(BUILD)/bench.before.txt
	$(GO) test -run '^$$' -bench '$(or $(BENCH),.)' -benchmem -count $(or $(COUNT),1) $(PKG) | tee $(BUILD)/bench.txt
	@[ ! -s $(BUILD)/bench.before.txt ] || $(MAKE) --no-print-directory bench-compare

.PHONY: bench-compare
bench-compare: $(BIN)/benchstat
	@echo; $(BIN)/benchstat before=$(BUILD)/bench.before.txt now=$(BUILD)/bench.txt

## Check -------------------------------------------------------------------------------------------------------------------

.PHONY: lint
lint: $(BIN)/golangci-lint ## Lint, and prove that the import rules between the rooms hold
	$(BIN)/golangci-lint config verify
	.ci/import-rules $(BIN)/golangci-lint
	$(BIN)/golangci-lint run $(PKG)

.PHONY: fmt
fmt: $(BIN)/golangci-lint ## Format the Go code as lint wants it
	$(BIN)/golangci-lint fmt

.PHONY: verify
verify: verify-fmt verify-mod verify-generated verify-schemas ## Check that formatting, go.mod, generated code and contracts are as committed

.PHONY: verify-fmt
verify-fmt:
	@bad=$$(git ls-files -co --exclude-standard '*.go' | xargs -r gofmt -l); [ -z "$$bad" ] || { echo "not formatted (make fmt):"; echo "$$bad"; exit 1; }
	@echo "verify: gofmt: clean"

.PHONY: verify-mod
verify-mod:
	@for dir in . tools tools/lint tools/oasdiff; do (cd $$dir && $(GO) mod tidy -diff) || { echo "verify: $$dir/go.mod is not tidy: cd $$dir && go mod tidy" >&2; exit 1; }; done
	@$(GO) mod verify >/dev/null && echo "verify: go.mod of the module and of tools, tools/lint, tools/oasdiff: tidy"

# The generators run on a copy and the copy is compared: the work tree is not touched, and files that should be gone are seen too.
.PHONY: verify-generated
verify-generated: generators
	@copy=$$(mktemp -d); trap 'rm -rf "$$copy"' EXIT; mkdir -p "$$copy/adapters"; cp -r go.mod schemas "$$copy/"; cp -r adapters/httpapi "$$copy/adapters/"; \
	  find "$$copy" -name '*.pb.go' -delete; \
	  $(MAKE) --no-print-directory -s -f $(abspath $(firstword $(MAKEFILE_LIST))) -C "$$copy" generate BIN=$(BIN); \
	  diff -ru schemas "$$copy/schemas" && diff -ru adapters/httpapi "$$copy/adapters/httpapi" || \
	  { echo "verify: generated code has drifted (lines with + are what the generators write): make generate, and commit" >&2; exit 1; }
	@echo "verify: generated code: no drift"

.PHONY: verify-schemas
verify-schemas: $(BIN)/buf $(BIN)/oasdiff
	$(BIN)/buf lint schemas
	$(BIN)/buf format --diff --exit-code schemas
	@.ci/schemas-breaking check $(BIN)/buf
	@schemas/openapi-breaking check $(BIN)/oasdiff

.PHONY: vuln
vuln: $(BIN)/govulncheck ## Look the dependencies up in Go's vulnerability database
	$(BIN)/govulncheck $(PKG)

.PHONY: ci
ci: ## Run what CI runs, in the way CI runs it (.ci/run)
	CI=true .ci/run </dev/null

## Generate ----------------------------------------------------------------------------------------------------------------

.PHONY: generate
generate: generators ## Generate the message code and the HTTP types from schemas/
	cd schemas && PATH="$(BIN):$$PATH" $(BIN)/buf generate
	$(BIN)/oapi-codegen -config adapters/httpapi/oapi-codegen.yaml schemas/openapi.yaml

.PHONY: schemas-baseline
schemas-baseline: $(BIN)/buf $(BIN)/oasdiff ## Record messages and HTTP interface as the promise that later changes are held to (refuses a breaking change)
	@.ci/schemas-breaking record $(BIN)/buf
	@schemas/openapi-breaking record $(BIN)/oasdiff

## Tools -------------------------------------------------------------------------------------------------------------------

.PHONY: tools generators
tools: generators $(BIN)/golangci-lint $(BIN)/oasdiff $(BIN)/govulncheck $(BIN)/benchstat $(BIN)/gotestsum ## Build the pinned tools into .build/bin
generators: $(BIN)/buf $(BIN)/protoc-gen-go $(BIN)/oapi-codegen

# In the copy that verify-generated makes there are no tools to build: BIN points at the built ones.
ifneq ($(wildcard tools/go.mod),)
$(BIN)/buf: TOOL = github.com/bufbuild/buf/cmd/buf
$(BIN)/oapi-codegen: TOOL = github.com/oapi-codegen/oapi-codegen/v2/cmd/oapi-codegen
$(BIN)/govulncheck: TOOL = golang.org/x/vuln/cmd/govulncheck
$(BIN)/benchstat: TOOL = golang.org/x/perf/cmd/benchstat
$(BIN)/gotestsum: TOOL = gotest.tools/gotestsum
$(BIN)/buf $(BIN)/oapi-codegen $(BIN)/govulncheck $(BIN)/benchstat $(BIN)/gotestsum: tools/go.mod tools/go.sum
	$(GO) build -C tools -o $@ $(TOOL) && touch $@

$(BIN)/golangci-lint: tools/lint/go.mod tools/lint/go.sum
	$(GO) build -C tools/lint -o $@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint && touch $@

# A module of its own: it reads OpenAPI with another version of kin-openapi than oapi-codegen does.
$(BIN)/oasdiff: tools/oasdiff/go.mod tools/oasdiff/go.sum
	$(GO) build -C tools/oasdiff -o $@ github.com/oasdiff/oasdiff && touch $@

# From this module's own go.mod, so that the generated code and the runtime that reads it are of one version.
$(BIN)/protoc-gen-go: go.mod
	$(GO) build -o $@ google.golang.org/protobuf/cmd/protoc-gen-go && touch $@
endif

.PHONY: clean
clean: ## Remove what was built
	rm -rf $(BUILD)

.PHONY: FORCE
FORCE:
