# make setup   makes .venv with all that development needs
# make demo    generates text with the bundled model (sets up first)
# make test    runs all checks and tests (sets up first)
# make test-fast   runs the tests that take about two minutes in all: not the slow ones, and natively
#                  on one instruction set
# make sanitize   runs the core's C++ tests under sanitizers, as make test does too
# make systems   compiles the core for other systems and processors and runs its tests there, as far as
#                the tools are installed, as make test does too
# make bench   measures; prints tables, writes JSON, draws the chart
# make bench-peers   installs what it compares with; llama.cpp compiles for about ten minutes
# make reproduce   trains on the paper's synthetic tasks anew (long), and writes their report
# make lint, make format

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
STAMP := .venv/.complete

.PHONY: setup demo test test-fast sanitize systems bench bench-peers reproduce lint format
.DEFAULT_GOAL := demo

setup: $(STAMP)

SOURCES := pyproject.toml CMakeLists.txt $(wildcard core/*/*.cpp core/*/*.h)

# torch is named with its version, because a bare name may bring gigabytes of CUDA libraries.
$(STAMP): $(SOURCES)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $(STAMP)

demo:
	@start=$$(date +%s); $(MAKE) --no-print-directory setup \
	&& $(BIN)/anymamba generate "ROMEO:" --max-new-tokens 300 --temperature 0.8 --seed 1 \
	&& echo "make demo took $$(($$(date +%s) - start)) s"

# The sanitizers' compilers and tests take what the checks and pytest leave of the processors.
test:
	@start=$$(date +%s); $(MAKE) --no-print-directory setup || exit 1; mkdir -p build; \
	nice $(MAKE) --no-print-directory sanitize > build/sanitize.log 2>&1 & sanitizers=$$!; \
	trap 'kill $$sanitizers 2> /dev/null; exit 130' INT TERM; \
	{ $(MAKE) --no-print-directory lint \
		&& $(BIN)/python -m pytest --numprocesses 2 --dist worksteal; } \
		|| { kill $$sanitizers 2> /dev/null; exit 1; }; \
	wait $$sanitizers; status=$$?; cat build/sanitize.log; \
	test $$status = 0 && echo "make test took $$(($$(date +%s) - start)) s"

test-fast: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not slow and not native_isa and not systems"

systems: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m systems -rs

# Memory and undefined behavior with each instruction set of this machine; threads, whose work is
# shared out by the same code in all of them, with the first choice alone. Others are not compiled.
# UndefinedBehaviorSanitizer would else only warn.
sanitize: setup
	@export PATH="$(abspath $(BIN)):$$PATH" UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1; \
	export CCACHE_BASEDIR="$(CURDIR)" CCACHE_NOHASHDIR=1; \
	isas=$$(python -c "from anymamba import _core; print(*_core.isas(), sep=';')") || exit 1; \
	for kind in address,undefined thread; do \
		test $$kind != thread || isas="$${isas%%;*}"; \
		echo "The C++ tests under $$kind, with $$isas" \
		&& cmake -S . -B build/$$kind -G Ninja --log-level=WARNING -DANYMAMBA_TESTS=ON \
			-DANYMAMBA_SANITIZE=$$kind -DANYMAMBA_ISAS="$$isas" \
			-DCMAKE_CXX_COMPILER_LAUNCHER="$(shell command -v ccache)" > /dev/null \
		&& cmake --build build/$$kind -- --quiet \
		&& ctest --test-dir build/$$kind --no-tests=error --parallel 2 --timeout 600 \
			--output-on-failure || exit 1; \
	done

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	for name in prefill decode generate train train_5m scan ssd memory runtime context start install dropin family server \
			distributed accuracy instruction_sets; do \
		$(BIN)/python benchmarks/$$name.py || exit 1; done
	$(BIN)/python benchmarks/arm_instructions.py || test $$? = 2  # which says that tools are missing
	$(BIN)/python benchmarks/gpu_instructions.py || test $$? = 2
	$(BIN)/python benchmarks/report.py
	$(BIN)/python benchmarks/chart.py || echo "The tables and JSON files are complete without it."

bench-peers: setup
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev,peers]"

# Beside the full run: other seeds, and trainings that leave something out.
reproduce: setup
	$(BIN)/python examples/selective_copying/train.py
	$(BIN)/python examples/induction_heads/train.py
	for run in "seed-1 --seed 1" "seed-2 --seed 2" \
			"one-length --lengths 256 --longest 8192" \
			"one-trigger --most-triggers 1 --steps 3000 --longest 8192" \
			"one-length-and-trigger --lengths 256 --most-triggers 1 --steps 3000 --longest 8192" \
			"steps-cost-nothing --step-cost 0 --longest 8192"; do \
		set -- $$run; name=$$1; shift; \
		$(BIN)/python examples/induction_heads/train.py "$$@" \
			--output examples/induction_heads/results/$$name.json || exit 1; done
	$(BIN)/python examples/synthetic_report.py
