"""A server moves while it runs, and its connections live."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

from tempest import config
from tempest.common import waiters
from tempest.lib import decorators
from tempest.lib import exceptions as lib_exc
from tempest.lib.common.utils import test_utils
from tempest.scenario import manager

from tempest_tests.scenario.download import Download

CONF = config.CONF
RUNNING = ("running", "completed")
OVER = ("completed", "failed", "error", "cancelled")


class LiveMigrationKeepsConnections(manager.NetworkScenarioTest):
    """Only SSH is admitted from outside, so what the peer says on a download is admitted by state alone."""

    compute_min_microversion = "2.30"

    @classmethod
    def skip_checks(cls) -> None:
        super().skip_checks()
        if not CONF.compute_feature_enabled.live_migration:
            raise cls.skipException("[compute-feature-enabled] live_migration is false")
        if CONF.compute.min_compute_nodes < 2:
            raise cls.skipException("[compute] min_compute_nodes is less than 2: there is nowhere to move to")

    @contextlib.contextmanager
    def download(self) -> Iterator[tuple[dict[str, Any], Download]]:
        """A server, and a download that it has begun."""
        keypair = self.create_keypair()
        group = self.create_security_group()
        server = self.create_server(key_name=keypair["name"], security_groups=[{"name": group["name"]}])
        address = self.get_server_ip(server)
        shell = self.get_remote_client(address, private_key=keypair["private_key"], server=server)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with Download(family) as download:
            peer = CONF.sami.peer_address or _own_address(address, family)
            shell.exec_command(f"nc {peer} {download.port} </dev/null >/dev/null 2>&1 & echo")
            download.accept()
            self.assert_lives(download)
            yield server, download

    def migrate(self, server: dict[str, Any]) -> None:
        """Asks for it, and returns at once."""
        self.os_admin.servers_client.live_migrate_server(server["id"], host=None, block_migration="auto")

    def has_moved(self, server: dict[str, Any], source: str) -> bool:
        """Waits until the migration is over."""
        self.migration(server, OVER)
        waiters.wait_for_server_status(self.os_admin.servers_client, server["id"], "ACTIVE")
        return bool(self.get_host_for_server(server["id"]) != source)

    def migration(self, server: dict[str, Any], states: tuple[str, ...]) -> dict[str, Any]:
        """The server's newest migration, once it is in one of these states."""
        newest: dict[str, Any] = {}

        def is_there() -> bool:
            known = self.os_admin.migrations_client.list_migrations()["migrations"]
            mine = [one for one in known if one["instance_uuid"] == server["id"]]
            newest.update(max(mine, key=lambda one: one["id"], default={}))
            return newest.get("status") in states

        if not test_utils.call_until_true(is_there, CONF.compute.build_timeout, 0.1):
            raise lib_exc.TimeoutException(f"the migration of {server['id']} is {newest.get('status')}")
        return newest

    def assert_lives(self, download: Download) -> None:
        """What the peer says from now on gets through."""
        silence = download.silence(CONF.sami.stall_seconds)
        assert silence <= CONF.sami.stall_seconds, f"nothing got through for {silence:.1f} s"

    @decorators.idempotent_id("5b0a3c9e-6c43-4f0a-8d55-0e5f4d1c7b21")
    @decorators.attr(type="slow")
    def test_connection_survives_the_way_there_and_back(self) -> None:
        with self.download() as (server, download):
            for _ in range(2):
                source = self.get_host_for_server(server["id"])
                self.migrate(server)
                assert self.has_moved(server, source)
                self.assert_lives(download)

    @decorators.idempotent_id("c1f6a9d4-93e7-4a67-b0c4-7d2e8a5f3e10")
    @decorators.attr(type="slow")
    def test_connection_survives_a_migration_that_is_aborted(self) -> None:
        with self.download() as (server, download):
            source = self.get_host_for_server(server["id"])
            self.migrate(server)
            migration = self.migration(server, RUNNING)
            with contextlib.suppress(lib_exc.BadRequest, lib_exc.NotFound):  # it was faster, and has moved
                self.os_admin.servers_client.delete(f"servers/{server['id']}/migrations/{migration['id']}")
            self.has_moved(server, source)
            self.assert_lives(download)

    @decorators.idempotent_id("e07d2b58-41a9-4f3b-9a8c-2b6c0d9e4f73")
    @decorators.attr(type="slow")
    def test_connections_survive_when_many_move_at_once(self) -> None:
        with contextlib.ExitStack() as stack:
            downloads = [stack.enter_context(self.download()) for _ in range(CONF.sami.servers)]
            sources = [self.get_host_for_server(server["id"]) for server, _ in downloads]
            for server, _ in downloads:
                self.migrate(server)
            for (server, download), source in zip(downloads, sources, strict=True):
                assert self.has_moved(server, source)
                self.assert_lives(download)


def _own_address(server: str, family: socket.AddressFamily) -> str:
    """The address that this host reaches the server from."""
    with socket.socket(family, socket.SOCK_DGRAM) as route:
        route.connect((server, 9))
        return str(route.getsockname()[0])
