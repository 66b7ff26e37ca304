"""The version of what is installed."""

from importlib import metadata


def release() -> str:
    """The version of the installed distribution, for example ``0.1.0``; pbr wrote it there, from git's tags.

    A tree that was never installed, for example one on PYTHONPATH, cannot know and is ``0.0.0``.
    """
    try:
        return metadata.version("sami_plugin")
    except metadata.PackageNotFoundError:
        return "0.0.0"
