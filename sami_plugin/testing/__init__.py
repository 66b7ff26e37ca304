"""For driver authors and for tests: a conformance suite, and two hosts in memory."""
