# Every command a person runs. `make` alone lists them.
SHELL := bash
CARGO := cargo
export CARGO_TERM_PROGRESS_WHEN ?= auto

# Folders of the languages; each has a Makefile with test, lint and dist.
LANGUAGES := $(patsubst %/Makefile,%,$(wildcard ffi-c/Makefile bindings-*/Makefile))

# The bindings lint theirs themselves.
RUST := etcdlock etcdlock-cli etcdlock-rig etcdlock-demo etcdlock-bench

# Prints what a step is and how long it took.
step = @printf '\n\033[1m== %s\033[0m\n' "$(1)"; start=$$SECONDS; $(2) && printf '== %s: done in %ss\n' "$(1)" "$$((SECONDS - start))"

SIMULATION = $(CARGO) test --release --locked -p etcdlock --lib -- --nocapture --test-threads 1 simulation::tests

.PHONY: help setup demo build test test-core test-versions safety-figures test-suite test-torture torture simulate lint dist clean $(LANGUAGES:%=test-%) $(LANGUAGES:%=lint-%) $(LANGUAGES:%=dist-%)

help:
	@echo "make demo    several programs share one counter on a throw-away etcd"
	@echo "make test    everything, from a fresh clone"
	@echo "make test-suite   one suite for every language and every pair of them (part of make test)"
	@echo "make simulate SECONDS=60    the core in virtual time, with faults, as long as you like"
	@echo "make torture SECONDS=300 [SEED=n]   workers in every language on a cluster under faults, with a checker and a report"
	@echo "make test-versions    core's tests on the newest etcd 3.5, 3.6 and 3.7 as well"
	@echo "make safety-figures   the figures of docs/safety.md (15 minutes)"
	@echo "make lint    formatters and linters, warnings denied"
	@echo "make dist    packages of every language, into dist/"
	@echo "make bench   figures beside a plain put and beside etcd's Go client"

setup:
	@tests/setup.sh

demo: setup
	@tests/demo.sh

test: setup test-core $(LANGUAGES:%=test-%) test-suite test-torture
	@printf '\n== all tests passed\n'

test-core: setup
	$(call step,core: build,$(CARGO) build --release --locked -p etcdlock-rig -p etcdlock-demo -p etcdlock-cli -p etcdlock --lib --bins --examples)
	$(call step,core: tests on memory and on a real etcd,$(CARGO) test --release --locked -p etcdlock -p etcdlock-rig -p etcdlock-demo -- --skip simulation::)
	$(call step,core: 10000 schedules in virtual time,ETCDLOCK_SCHEDULES=10000 $(SIMULATION))
	$(call step,core: on the newest etcd,tests/versions.sh --quick)
	$(call step,the command: tests,$(CARGO) test --release --locked -p etcdlock-cli)
	$(call step,demo,tests/demo.sh > target/demo.log 2>&1 || { cat target/demo.log; exit 1; })

$(LANGUAGES:%=test-%): test-%: setup test-core
	$(call step,$*: tests,$(MAKE) --no-print-directory -C $* test)

test-versions: setup
	@tests/versions.sh

safety-figures: setup
	$(CARGO) build --release --locked -p etcdlock --example figures
	@target/release/examples/figures $(PART)

# After the languages, whose builds they use.
ifneq ($(filter test,$(MAKECMDGOALS)),)
test-suite: $(LANGUAGES:%=test-%)
test-torture: test-suite
endif
test-suite: setup
	$(call step,one suite for every language and every pair,python3 tests/suite/run.py $(if $(WRITE),--write) $(if $(ONLY),--only "$(ONLY)"))

test-torture: setup
	$(call step,torture: the checker catches each kind of violation,cd tests/torture && python3 -m unittest -q test_checker)
	$(call step,torture: clients with one protection taken out are caught,python3 tests/torture/test_sabotage.py)
	$(call step,torture: 60 s of faults,python3 tests/torture/torture.py --seconds 60)

# Workers in every language under faults: make torture SECONDS=300 [SEED=n]; what it has seen is in target/torture.
torture: setup
	@python3 tests/torture/torture.py --seconds $(or $(SECONDS),300) $(if $(SEED),--seed $(SEED))

lint: setup
	$(call step,rustfmt,$(CARGO) fmt --all --check)
	$(call step,clippy,$(CARGO) clippy --release --locked $(RUST:%=-p %) --all-targets -- -D warnings)
	$(call step,rustdoc,RUSTDOCFLAGS="-D warnings" $(CARGO) doc --release --locked --no-deps -p etcdlock)
	@for language in $(LANGUAGES); do $(MAKE) --no-print-directory -C $$language lint || exit 1; done

# As many schedules as SECONDS give time for, with seeds that nobody has seen.
simulate: setup
	$(call step,simulation for $(or $(SECONDS),60) s,ETCDLOCK_SIMULATE_SECONDS=$(or $(SECONDS),60) ETCDLOCK_FIRST_SEED=$$(date +%s%3N)000 $(SIMULATION)::nothing)

dist: setup
	$(CARGO) build --release --locked -p etcdlock-cli
	@mkdir -p dist/completions
	@cp target/release/etcdlock dist/etcdlock && strip dist/etcdlock
	@dist/etcdlock generate man > dist/etcdlock.1
	@for shell in bash zsh fish; do dist/etcdlock generate $$shell > dist/completions/etcdlock.$$shell; done
	@for language in $(LANGUAGES); do $(MAKE) --no-print-directory -C $$language dist || exit 1; done
	@ls -lh dist dist/npm 2>/dev/null

bench: setup
	@bench/run.sh

clean:
	$(CARGO) clean
	rm -rf dist .venv
