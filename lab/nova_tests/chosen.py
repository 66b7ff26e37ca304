"""Which of Nova's tests are run: a module, and what the full names of its tests have to say, whatever the case."""

from __future__ import annotations

Chosen = list[tuple[str, str]]

_ANY = "."
_MIGRATE = "live_?migrat"

UNIT: Chosen = [
    ("nova.tests.unit.compute.test_compute", _MIGRATE),
    ("nova.tests.unit.compute.test_compute_mgr", _MIGRATE),
    ("nova.tests.unit.compute.test_rpcapi", _MIGRATE),
    ("nova.tests.unit.conductor.tasks.test_live_migrate", _ANY),
    ("nova.tests.unit.virt.libvirt.test_driver", _MIGRATE),
    ("nova.tests.unit.virt.libvirt.test_migration", _ANY),
    ("nova.tests.unit.virt.test_virt_drivers", _MIGRATE),
]
FUNCTIONAL: Chosen = [
    ("nova.tests.functional.compute.test_live_migration", "Neutron|TestVolAttachments"),
    ("nova.tests.functional.libvirt.test_live_migration", "LiveMigrationQueuedAbort"),
    ("nova.tests.functional.libvirt.test_numa_live_migration", "Positive.*test_numa_live_migration$"),
    ("nova.tests.functional.test_servers", r"\.ServerMovingTests\.test_live_migrate(_rollback.*allocations)?$"),
    ("nova.tests.functional.test_servers", r"\.ServerLiveMigrateForceAndAbort\."),
    # Migrations that went wrong some time.
    ("nova.tests.functional.regressions.test_bug_1628606", _ANY),
    ("nova.tests.functional.regressions.test_bug_1888395", _ANY),
    ("nova.tests.functional.regressions.test_bug_1889108", _ANY),
    ("nova.tests.functional.regressions.test_bug_1899835", _ANY),
    ("nova.tests.functional.regressions.test_bug_1939545", _ANY),
    ("nova.tests.functional.regressions.test_bug_1944619", _ANY),
    ("nova.tests.functional.regressions.test_bug_2143972", _ANY),
]
WIDE: Chosen = [
    ("nova.tests.functional.compute.test_live_migration", _ANY),
    ("nova.tests.functional.libvirt.test_live_migration", _ANY),
    ("nova.tests.functional.libvirt.test_numa_live_migration", _ANY),
    ("nova.tests.functional.libvirt.test_pci_sriov_servers", _MIGRATE),
    ("nova.tests.functional.libvirt.test_vgpu", _MIGRATE),
    ("nova.tests.functional.libvirt.test_vtpm", _MIGRATE),
    ("nova.tests.functional.test_servers", _MIGRATE),
    *((f"nova.tests.functional.regressions.test_bug_{number}", _ANY) for number in (1595962, 1797580, 2044235)),
    ("nova.tests.functional.regressions.test_bug_1848343", _MIGRATE),
]
"""What else there is."""


def chosen(kind: str, *, is_wide: bool) -> Chosen:
    """Of a kind of tests: each is run in a process of its own, as Nova's developers run them."""
    if kind == "unit":
        return UNIT
    return FUNCTIONAL + WIDE if is_wide else FUNCTIONAL


KINDS = ("unit", "functional")
