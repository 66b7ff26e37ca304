"""What is made of tempest's own words; no lab is needed."""

from __future__ import annotations

from lab.openstack.tempest import has_skipped

TOTALS = """
Ran: 3 tests in 182.9405 sec.
 - Passed: {}
 - Skipped: {}
 - Failed: 0
"""


def test_test_that_was_skipped_is_noticed() -> None:
    assert not has_skipped(TOTALS.format(3, 0))
    assert has_skipped(TOTALS.format(2, 1))
    assert has_skipped(TOTALS.format(0, 10))


def test_tempest_that_said_nothing_did_not_run_its_tests() -> None:
    assert has_skipped("")
