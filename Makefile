# Thin targets: each prepares the clone (tools/prepare, quick when there is nothing to do) and runs one command.
# Pass more to a command with ARGS, for example: make test ARGS="-k conntrack".

PYTHON_HERE := .venv/bin/python
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test bench fuzz fuzz-properties soak lint docs clean run-tests run-lint lint-style lint-layers lint-types
.PHONY: demo-nova prepare-kernels prepare-openstack prepare-tempest test-kernels test-nova test-nova-own test-tempest
.PHONY: test-kills demo-libvirt prepare-all prepare-demo prepare-test prepare-libvirt run-libvirt-tests test-libvirt test-long

help: ## say what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST)

demo: prepare-demo ## two hosts, one guest that moves, and its connections with and without SAMI
	$(PYTHON_HERE) -m lab.demo $(ARGS)

demo-libvirt: prepare-libvirt ## the same with two real libvirt hosts and QEMU guests, as root
	$(PYTHON_HERE) -m lab.libvirt.demo $(ARGS)

demo-nova: prepare-openstack ## the same with a small OpenStack, whose Nova migrates the guest; as root, 15 minutes
	$(PYTHON_HERE) -m lab.openstack.demo $(ARGS)

# -k: when lint fails the tests run all the same, and make still fails.
test: prepare-all ## lint, then all tests: unit tests, the real kernel, the lab, real libvirt
	@$(MAKE) --no-print-directory -k run-lint run-tests run-libvirt-tests

test-libvirt: prepare-libvirt run-libvirt-tests ## the tests on real libvirt hosts alone, as root

test-nova: prepare-openstack ## the tests on a small OpenStack: Nova migrates guests, things go wrong; as root, 30 minutes
	$(PYTEST_IN_A_WORLD) tests/nova $(ARGS)

test-tempest: prepare-tempest ## tempest itself with our plugin, on that OpenStack with SAMI; as root, 15 minutes
	$(PYTHON_HERE) -m lab.openstack.tempest $(ARGS)

test-nova-own: prepare-openstack ## Nova's own tests of live migration with our notification driver beside theirs; as root, an hour
	$(PYTHON_HERE) -m lab.nova_tests $(ARGS)

# First the lab itself, here; then the tests in it. KERNEL=bookworm-backports and trixie-backports are newer ones.
KERNEL ?= bookworm

# In a world, so that the broker ends with it. What the tests take is in build/kernels/junit.xml.
test-kernels: prepare-kernels ## what takes another kernel than this machine's: Debian's 6.1, in QEMU; an hour or more
	$(PYTHON_HERE) -m pytest tests/kernels/test_lab.py
	$(PYTHON_HERE) -m lab.isolation -- $(PYTHON_HERE) -m lab.kernels --suite $(KERNEL) -t 10800 --broker \
		--output build/kernels -- sh -c '$(PYTHON_HERE) -m pytest --timeout 1800 --junit-xml=$$OUTPUT/junit.xml \
		-o junit_family=xunit1 tests/kernels tests/functional/test_linux_conntrack.py \
		tests/functional/test_linux_conntrack_traffic.py tests/functional/test_linux_conntrack_extended.py \
		tests/functional/test_window_checks.py tests/functional/test_accounting.py \
		tests/functional/test_nft_sets.py tests/functional/test_ipsets.py tests/functional/test_pcp.py $(ARGS)'

test-long: prepare-libvirt ## 50 migrations by real libvirt, and what a guest's streams notice; as root, 12 minutes
	$(PYTHON_HERE) -m lab.libvirt.soak $(ARGS)

test-kills: prepare-libvirt ## agents killed before every write and act, in every sequence; as root, three hours
	$(PYTEST_IN_A_WORLD) --every-step tests/functional/test_kill.py tests/libvirt/test_kill.py $(ARGS)

bench: prepare-test ## measure
	$(PYTHON_HERE) -m benchmarks $(ARGS)

SECONDS ?= 60

fuzz: prepare-test ## spoiled inputs for all that reads what others wrote, SECONDS=60 for each of it
	$(PYTHON_HERE) -m tests.fuzz.guided --seconds $(SECONDS) $(ARGS)

fuzz-properties: prepare-test ## the property tests with many more examples
	$(PYTHON_HERE) -m pytest tests/unit -m hypothesis -p tools.fuzz_profile --timeout=0 $(ARGS)

RUNS ?= 100000

soak: prepare-test ## the simulator, RUNS=100000 of its runs: hosts in memory, and all that may go wrong between them
	$(PYTHON_HERE) -m sami_plugin.testing.simulator --runs $(RUNS) $(ARGS)

lint: prepare-test run-lint ## ruff, import-linter, mypy

docs: prepare-test ## the documentation, into doc/build/html
	$(PYTHON_HERE) -m sphinx -W --keep-going -q -b html doc/source doc/build/html $(ARGS)

clean: ## remove what building and testing left; .venv stays
	rm -rf build dist doc/build .eggs .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache \
		.ruff_cache .stestr .tox cover
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

run-lint: lint-style lint-layers lint-types

lint-style:
	$(PYTHON_HERE) -m ruff check --quiet .
	$(PYTHON_HERE) -m ruff format --check --quiet .
	.venv/bin/bashate devstack/*

lint-layers:
	.venv/bin/lint-imports --no-logo

lint-types:
	$(PYTHON_HERE) -m mypy

# /run is the lab's own; what another user left in /tmp is in nobody's way.
PYTEST_IN_A_WORLD := $(PYTHON_HERE) -m lab.isolation -- env PYTEST_DEBUG_TEMPROOT=/run $(PYTHON_HERE) -m pytest

run-tests:
	$(PYTEST_IN_A_WORLD) -n 4 --ignore tests/kernels --ignore tests/libvirt --ignore tests/nova tests $(ARGS)

# Alone and one by one: guests that are emulated, and what they measure, take both processors.
run-libvirt-tests:
	$(PYTEST_IN_A_WORLD) tests/libvirt $(ARGS)

prepare-demo:
	@tools/prepare demo

prepare-test:
	@tools/prepare test

# The lab of libvirt hosts needs the machine's root; its tests are skipped for anybody else, and say so.
prepare-all:
	@tools/prepare $$(test $$(id -u) -eq 0 && echo libvirt || echo test)

prepare-kernels:
	@tools/prepare kernels

prepare-libvirt:
	@tools/prepare libvirt

prepare-openstack:
	@tools/prepare openstack

prepare-tempest:
	@tools/prepare tempest
