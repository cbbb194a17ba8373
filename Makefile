# Every command sets up what it needs. CI calls only these.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PY := .venv/bin/python
STAMP := .venv/.locked
# Images of CI often set it; then each process of the tests compiles torch's or kubernetes' Python anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: bench-operator system help demo test test-unit test-kernels test-fuzz test-ranks test-clients test-apiserver test-cluster test-rolls test-faults check scan format bench image cluster cluster-down lock

help:  ## show this list
	@grep -hE '^[a-z-]+%?:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

demo: system $(STAMP)  ## a fresh machine to streamed tokens from an InferenceDeployment on a real cluster
	@$(PY) -u hack/demo

# Tests on the cluster mostly wait for it, so the others run beside them. sed passes whole lines on.
test: system check scan  ## the whole CPU suite, including a real API server and a real node
	@python3 -u hack/cluster binaries --karpenter
	@set -o pipefail; run() { $(MAKE) --no-print-directory "$$@" 2>&1 | sed -u ''; }; \
	run -k test-cluster test-kernels & cluster=$$!; \
	run -k test-unit test-apiserver; others=$$?; \
	wait $$cluster && exit $$others

test-unit: $(STAMP)  ## unit, property and contract tests: no cluster
	$(PY) -m pytest tests -m "not gpu and not apiserver and not e2e and not clients and not kernels"

test-kernels: $(STAMP)  ## every kernel compiled for gfx942, gfx950 and sm90 within its limits: no GPU
	$(PY) -m pytest tests -m kernels

test-fuzz: $(STAMP)  ## 100,000 requests of every shape on the real engine
	TILEFLEET_FUZZ_REQUESTS=100000 $(PY) -m pytest tests/worker/server/test_fuzz.py --timeout 0 -rP

test-ranks: $(STAMP)  ## tensor parallelism over 2, 4 and 8 processes
	for n in 2 4 8; do TILEFLEET_TEST_RANKS=$$n $(PY) -m pytest tests/worker/test_tensor_parallel.py -q --timeout 900 || exit 1; done

test-clients: $(STAMP) .venv-clients/.locked  ## langchain, litellm, instructor and lm-eval, unmodified, against a running worker
	$(PY) -m pytest tests/worker/server/clients -m clients

test-apiserver: system $(STAMP)  ## tests on a real API server, and a sample of the faults
	@python3 -u hack/cluster binaries
	$(PY) -m pytest tests -m "apiserver and not e2e and not gpu" --timeout 900

test-cluster: system $(STAMP)  ## tests on the local cluster with the images
	@python3 -u hack/cluster binaries --karpenter
	$(PY) -m pytest tests -m "e2e and not gpu" --timeout 900

test-rolls: system $(STAMP)  ## 20 rolls and 20 scale-downs under 60 open streams; `make test` does one of each
	@python3 -u hack/cluster binaries
	ROLLS=20 $(PY) -m pytest tests/e2e/test_rolls.py -s --timeout 14400

test-faults: system $(STAMP)  ## every fault at every write of a fleet's life: kills, errors, dead watches, frozen leaders (RESULTS=FILE: go on after a stop)
	@python3 -u hack/cluster binaries > /dev/null
	$(PY) -m tests.faults $(if $(RESULTS),--results $(RESULTS))

check: $(STAMP)  ## format, lint, types, import contracts, generated files, line budget
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	MYPYPATH=hack/cluster .venv/bin/mypy --strict --explicit-package-bases -p kit
	PYTHONPATH= .venv/bin/lint-imports
	$(PY) -m tilefleet_operator crd | diff -u crds/tilefleet.io_inferencedeployments.yaml -
	diff -r crds helm/tilefleet/files/crds
	$(PY) hack/reference.py --check
	$(PY) hack/line_budget.py

scan: $(STAMP)  ## policies of checkov over the rendered chart
	$(PY) hack/scan.py

format: $(STAMP)  ## write the format that check expects
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

bench: $(STAMP)  ## every benchmark, JSON lines
	@for b in benchmarks/*.py; do $(PY) $$b || exit 1; done

# A file called operator.py would hide the standard library's.
bench-operator: system $(STAMP)  ## the operator at 1,000 fleets beside a plain kopf operator
	@python3 -u hack/cluster binaries > /dev/null
	@$(PY) benchmarks/operator_scale.py

bench-%: $(STAMP)  ## one benchmark, e.g. bench-engine-cpu
	@$(PY) benchmarks/$(subst -,_,$*).py

image: system  ## build the images with docker, podman or buildah, whichever is there
	@python3 -u hack/image build

cluster: system  ## start the local cluster
	@python3 -u hack/cluster up

cluster-down:  ## stop it; nothing is left
	@python3 -u hack/cluster down

lock:  ## pin every dependency anew
	@hack/uv.sh lock

system:
	@python3 -u hack/system_packages.py

$(STAMP): locks/dev.txt pyproject.toml hack/uv.sh
	@hack/uv.sh sync
	@touch $@

.venv-clients/.locked: locks/clients.txt hack/uv.sh
	@hack/uv.sh clients
	@touch $@
