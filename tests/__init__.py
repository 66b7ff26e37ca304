"""All tests; see doc/source/contributor/architecture.rst for what goes where."""
