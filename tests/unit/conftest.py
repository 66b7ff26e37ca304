import pytest
from futurist import _thread


@pytest.fixture(autouse=True)
def idle_threads_end_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """oslo.messaging's, for which each agent of these tests waits at its end: they look up once a second."""
    monkeypatch.setattr(_thread.ThreadWorker, "MAX_IDLE_FOR", 0.05)
