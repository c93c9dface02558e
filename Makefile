# Every command a person runs. `make` alone lists them.
SHELL := bash
CARGO := cargo
export CARGO_TERM_PROGRESS_WHEN ?= auto

# Folders of the languages; each has a Makefile with test, lint and dist.
LANGUAGES := $(patsubst %/Makefile,%,$(wildcard ffi-c/Makefile bindings-*/Makefile))

# The bindings lint theirs themselves.
RUST := etcdlock etcdlock-cli etcdlock-rig etcdlock-demo etcdlock-examples etcdlock-bench etcdlock-header etcdlock-features

# Prints what a step is and how long it took.
step = @printf '\n\033[1m== %s\033[0m\n' "$(1)"; start=$$SECONDS; $(2) && printf '== %s: done in %ss\n' "$(1)" "$$((SECONDS - start))"

SIMULATION = $(CARGO) test --release --locked -p etcdlock --lib -- --nocapture --test-threads 1 simulation::tests

.PHONY: help setup demo test test-long test-all test-packed test-checker test-sabotage dist-try test-versions safety-figures test-suite torture simulate lint dist bench clean \
	$(LANGUAGES:%=test-%) $(LANGUAGES:%=lint-%)

help:
	@echo "make demo        several programs share one counter on a throw-away etcd (4 minutes the first time, then seconds)"
	@echo "make test        what shows a change to be right, in every language (12 minutes the first time)"
	@echo "make test-all    that and what takes long: valgrind, torture, newest etcd (45 minutes the first time)"
	@echo "make lint        formatters and linters, warnings denied"
	@echo "make dist        packages of every language, into dist/"
	@echo "make bench       figures beside a plain put and beside etcd's Go client"
	@echo "and parts of these:"
	@echo "make $(LANGUAGES:%=test-%)   the tests of a language"
	@echo "make test-suite [ONLY=words]     one suite for every language and every pair of them"
	@echo "make test-packed                 what is in dist, installed and used in a fresh root"
	@echo "make test-versions               core's tests on the newest etcd 3.5, 3.6 and 3.7 as well"
	@echo "make simulate SECONDS=60         the core in virtual time, with faults, as long as you like"
	@echo "make torture SECONDS=300 [SEED=n]  workers in every language on a cluster under faults, with a checker and a report"
	@echo "make safety-figures [PART=…]     the figures of docs/safety.md (15 minutes)"

setup:
	@tools/setup.sh

demo:
	@tools/setup.sh demo
	@tools/demo.sh

# VERBOSE=1 shows what the steps print, KEEP_GOING=1 goes on after a failure.
test:
	@tools/test.sh short

test-long:
	@tools/test.sh long

test-all:
	@tools/test.sh all

$(LANGUAGES:%=test-%): test-%: setup
	@$(MAKE) --no-print-directory -C $* test

test-versions: setup
	@tests/versions.sh

safety-figures: setup
	$(CARGO) build --release --locked -p etcdlock --example figures
	@target/release/examples/figures $(PART)

# They are in Python, and each says what it leaves out.
test-suite: setup
	@$(call with_python,python3 tests/suite/run.py $(if $(WRITE),--write) $(if $(ONLY),--only "$(ONLY)"))

test-checker:
	@$(call with_python,cd tests/torture && python3 -m unittest -q test_checker)

test-sabotage: setup
	@$(call with_python,python3 tests/torture/test_sabotage.py)

with_python = if command -v python3 >/dev/null; then $(1); else echo "skipped: python3 is not installed"; fi

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
	$(CARGO) build --release --locked -p etcdlock-rig -p etcdlock-cli -p etcdlock-ffi -p etcdlock-python -p etcdlock-node -p etcdlock-uniffi
	@mkdir -p dist/completions
	@cp target/release/etcdlock dist/etcdlock && strip dist/etcdlock
	@dist/etcdlock generate man > dist/etcdlock.1
	@for shell in bash zsh fish; do dist/etcdlock generate $$shell > dist/completions/etcdlock.$$shell; done
	@for language in $(LANGUAGES); do $(MAKE) --no-print-directory -C $$language dist || exit 1; done
	@ls -lh dist dist/npm 2>/dev/null

# Beside the packages what a user's own build makes of them: the examples in C, C++ and Java.
dist-try: dist
	@rm -rf dist/try && mkdir -p dist/try/java
	@cp target/uniffi/lib/jna-[0-9]*.jar target/uniffi/lib/kotlin-stdlib-[0-9]*.jar dist/try/java/
	@javac -cp 'dist/*:dist/try/java/*' -d dist/try/java examples/java/Counter.java
	@cd dist && tree=$$(echo libetcdlock-*/) && flags="-I$$tree/include -L$$tree/lib" && \
		gcc -std=c11 ../examples/c/counter.c $$flags -letcdlock -pthread -o try/counter-c && \
		g++ -std=c++17 ../examples/cpp/counter.cpp $$flags -letcdlock -pthread -o try/counter-cpp

# Installed and used on a machine that has neither compiler nor checkout; where no such machine can be made, on this one.
test-packed: dist-try
	tools/fresh-machine packed -- bash use-packages.sh || { [ $$? = 77 ] && echo "skipped: the fresh machine; here instead" && tools/use-packages.sh; }

bench: setup
	@bench/run.sh

clean:
	$(CARGO) clean
	rm -rf dist .venv
