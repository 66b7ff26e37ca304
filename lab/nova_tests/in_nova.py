"""Runs some of Nova's own tests in this process, and writes down what happens: started by path, by Nova's Python.

    python in_nova.py nova.conf chosen.json log

`nova.conf` is what Nova's tests read instead of no file; where there is no such file, Nova is left as it is and only
how tests end is written down. `chosen.json` is an object: `modules` are pairs of a module of tests and what the full
names of its tests have to say, a regular expression; `only`, if it is not null, the names of those of them to run.
`log` becomes lines of JSON in the order of time, each with
`at`, seconds of CLOCK_MONOTONIC, and `test`: how a test ended; what Nova notified; what Nova called.

Nova's tests put notifiers of their own in the place of Nova's. Here Nova's real ones, made as its configuration says,
are told as well and first, so their drivers run where they run in nova-compute: in the thread that migrates. Beside
that, functions are wrapped that they be seen, and the tests wait longer.
"""

import contextlib
import functools
import importlib.util
import json
import os
import re
import sys
import time
import unittest

DRIVER_CALLS = (
    "check_can_live_migrate_destination",
    "check_can_live_migrate_source",
    "cleanup_live_migration_destination_check",
    "pre_live_migration",
    "plug_vifs",
    "live_migration",
    "post_live_migration",
    "post_live_migration_at_source",
    "post_live_migration_at_destination",
    "rollback_live_migration_at_source",
    "rollback_live_migration_at_destination",
)
NETWORK_CALLS = ("bind_ports_to_host", "setup_networks_on_host", "migrate_instance_start", "migrate_instance_finish")


class Log:
    """Lines of JSON; of any thread, for each is one write."""

    def __init__(self, path):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.test = None

    def write(self, **said):
        line = json.dumps({"at": time.monotonic(), "test": self.test, **said}, default=str)
        os.write(self._file, line.encode() + b"\n")


class Outcomes(unittest.TestResult):
    """Writes how each test ends. A test that has several failures ends as the first of them says."""

    def __init__(self, log):
        super().__init__()
        self._log = log
        self._ended = None
        self._words = ""

    def startTest(self, test):  # noqa: N802
        super().startTest(test)
        self._log.test = test.id()
        self._ended, self._words, self._began = None, "", time.monotonic()

    def stopTest(self, test):  # noqa: N802
        seconds = round(time.monotonic() - self._began, 3)
        self._log.write(outcome=self._ended or "passed", seconds=seconds, words=self._words)
        self._log.test = None
        super().stopTest(test)

    def addError(self, test, err):  # noqa: N802
        super().addError(test, err)
        if self._log.test is None:  # a class or a module that cannot be set up is no test that began
            self._log.write(broken=test.id(), words=self.errors[-1][1])
        self._end("failed", self.errors[-1][1])

    def addFailure(self, test, err):  # noqa: N802
        super().addFailure(test, err)
        self._end("failed", self.failures[-1][1])

    def addSkip(self, test, reason):  # noqa: N802
        super().addSkip(test, reason)
        self._end("skipped", reason)

    def addExpectedFailure(self, test, err):  # noqa: N802
        super().addExpectedFailure(test, err)
        self._end("failed as expected", "")

    def addUnexpectedSuccess(self, test):  # noqa: N802
        super().addUnexpectedSuccess(test)
        self._end("failed", "it was expected to fail")

    def _end(self, how, words):
        if self._ended in (None, "skipped"):
            self._ended, self._words = how, words


def read_configuration(path):
    """Nova's tests say that there is no configuration file; now there is one."""
    from nova import config

    parse_args = config.parse_args

    @functools.wraps(parse_args)
    def with_a_file(argv, default_config_files=None, **more):
        return parse_args(argv, default_config_files=default_config_files or [path], **more)

    config.parse_args = with_a_file


def tell_real_notifiers(log):
    """What Nova's tests catch, Nova's own notifiers are told as well, with the drivers of the configuration."""
    import oslo_messaging
    from nova import rpc
    from nova.tests.fixtures import notifications

    real = {}
    set_up = notifications.NotificationFixture.setUp

    @functools.wraps(set_up)
    def keep_the_real_ones(self):
        # The fixture stubs these two for the test, which ends before the next fixture is set up.
        real[notifications.FakeNotifier] = rpc.LEGACY_NOTIFIER
        real[notifications.FakeVersionedNotifier] = rpc.NOTIFIER
        set_up(self)

    def tell_both(kind):
        caught = kind.__dict__["_notify"]

        @functools.wraps(caught)
        def tell(self, priority, ctxt, event_type, payload):
            notifier = real[kind].prepare(publisher_id=self.publisher_id)
            getattr(notifier, priority.lower())(ctxt, event_type, payload)
            return caught(self, priority, ctxt, event_type, payload)

        kind._notify = tell

    notify = oslo_messaging.Notifier._notify

    @functools.wraps(notify)
    def seen(self, ctxt, event_type, payload, priority, publisher_id=None, retry=None):
        drivers = list(self._driver_mgr.names()) if hasattr(self, "_driver_mgr") else []
        if "live" in event_type and "migration" in event_type:
            said = payload.get("nova_object.data", payload)
            log.write(
                notified=event_type,
                publisher=publisher_id or self.publisher_id,
                guest=said.get("uuid") or said.get("instance_id"),
                guests_host=said.get("host"),
                drivers=drivers,
            )
        began = time.monotonic()
        try:
            return notify(self, ctxt, event_type, payload, priority, publisher_id, retry)
        finally:
            took = time.monotonic() - began
            if "sami" in drivers and took > 0.1:
                log.write(held_seconds=round(took, 3), by=event_type)

    notifications.NotificationFixture.setUp = keep_the_real_ones
    tell_both(notifications.FakeNotifier)
    tell_both(notifications.FakeVersionedNotifier)
    oslo_messaging.Notifier._notify = seen


def watch_calls(log):
    """Nova's virt drivers and its Neutron client, whenever they are called to migrate."""
    from nova.compute import manager
    from nova.context import RequestContext
    from nova.network import neutron
    from nova.objects import Instance
    from nova.virt import fake
    from nova.virt.libvirt import driver as libvirt_driver

    hosts = {}
    made = manager.ComputeManager.__init__

    @functools.wraps(made)
    def know_the_host(self, *words, **named):
        made(self, *words, **named)
        hosts[id(self.driver)] = self.host

    manager.ComputeManager.__init__ = know_the_host

    def known(guest, field):
        # To ask for a field that is not there would make Nova look for it.
        return getattr(guest, field) if guest is not None and guest.obj_attr_is_set(field) else None

    def watch(kind, name):
        called = kind.__dict__[name]

        @functools.wraps(called)
        def seen(self, *words, **named):
            found = [*words, *named.values()]
            guest = next((one for one in found if isinstance(one, Instance)), None)
            context = next((one for one in found if isinstance(one, RequestContext)), None)
            log.write(
                called=name,
                on=hosts.get(id(self)),
                guest=known(guest, "uuid"),
                guests_host=known(guest, "host"),
                request_id=getattr(context, "request_id", None),
            )
            return called(self, *words, **named)

        setattr(kind, name, seen)

    drivers = [kind for kind in vars(fake).values() if isinstance(kind, type)] + [libvirt_driver.LibvirtDriver]
    for kinds, names in ((drivers, DRIVER_CALLS), ([neutron.API], NETWORK_CALLS)):
        for kind in kinds:
            for name in names:
                if callable(kind.__dict__.get(name)):
                    watch(kind, name)


def be_patient():
    """Nova's tests wait some 5 s for what a migration does; an agent that is deaf takes 4 of them."""
    from nova.tests.functional.integrated_helpers import InstanceHelperMixin

    def wait_longer(name):
        wait = InstanceHelperMixin.__dict__[name]

        @functools.wraps(wait)
        def patient(self, *words, **named):
            for _ in range(3):
                with contextlib.suppress(AssertionError):
                    return wait(self, *words, **named)
            return wait(self, *words, **named)

        setattr(InstanceHelperMixin, name, patient)

    for name in ("_wait_for_migration_status", "_wait_for_server_parameter", "_wait_for_action_fail_completion"):
        wait_longer(name)


def chosen_tests(chosen, log):
    """A suite of the tests that are chosen. A module that this release does not have is logged."""

    def flat(suite):
        for one in suite:
            if isinstance(one, unittest.TestSuite):
                yield from flat(one)
            else:
                yield one

    tests = {}
    only = None if chosen["only"] is None else set(chosen["only"])
    for module, pattern in chosen["modules"]:
        if importlib.util.find_spec(module) is None:
            log.write(absent=module)
            continue
        for test in flat(unittest.defaultTestLoader.loadTestsFromName(module)):
            # A module that cannot be imported is a test that fails, of another name.
            is_chosen = re.search(pattern, test.id(), re.IGNORECASE) or "unittest.loader" in test.id()
            if is_chosen and (only is None or test.id() in only):
                tests[test.id()] = test  # two patterns may choose it
    return unittest.TestSuite(tests.values())


def main(configuration, chosen, log_path):
    """Run them; always 0 when they ran, however they ended."""
    log = Log(log_path)
    import nova.tests.functional  # it chooses the kind of threads: first of all that is imported
    import nova.test  # noqa: F401, isort:skip

    if os.path.exists(configuration):
        read_configuration(configuration)
        tell_real_notifiers(log)
        watch_calls(log)
        be_patient()
    with open(chosen) as file:
        suite = chosen_tests(json.load(file), log)
    suite.run(Outcomes(log))
    log.test = None
    log.write(ended=True)
    # Nova's tests leave threads behind that wait for ever.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
