"""Builds the distribution with pbr; everything declared is in ``setup.cfg``."""

import os

import setuptools


def _trust_this_tree_for_git() -> None:
    """Let pbr ask git for the version in a tree that another user owns.

    git refuses such a tree ("dubious ownership") and pbr would then fail without naming the cause. Whoever runs this
    file already trusts its owner; the permission holds for this process and this directory alone.
    """
    count = int(os.environ.get("GIT_CONFIG_COUNT") or 0)
    os.environ[f"GIT_CONFIG_KEY_{count}"] = "safe.directory"
    os.environ[f"GIT_CONFIG_VALUE_{count}"] = os.path.dirname(os.path.abspath(__file__))
    os.environ["GIT_CONFIG_COUNT"] = str(count + 1)


_trust_this_tree_for_git()
setuptools.setup(setup_requires=["pbr>=5.10.0"], pbr=True)
