"""A server moves while it runs, and its connections live."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tempest import config
from tempest.common import waiters
from tempest.lib import decorators
from tempest.lib import exceptions as lib_exc
from tempest.lib.common.utils import test_utils
from tempest.scenario import manager

from tempest_tests.scenario.download import Download

CONF = config.CONF
OVER = ("completed", "failed", "error", "cancelled")
RUNNING = ("running", *OVER)
LOOK_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Move:
    """A migration that was asked for; `number` counts the server's, from 0."""

    server: str
    source: str
    number: int


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
            # At the end of its input nc would shut its side down, and a half-closed connection were watched. Whoever
            # held the shell's channels would keep it from ending.
            shell.exec_command(f"(tail -f /dev/null | nc {peer} {download.port}) </dev/null >/dev/null 2>&1 & echo")
            download.accept()
            self.assert_lives(download)
            yield server, download

    def migrate(self, server: dict[str, Any]) -> Move:
        """Asks for it, and returns at once."""
        move = Move(server["id"], self.get_host_for_server(server["id"]), len(self.migrations(server["id"])))
        self.os_admin.servers_client.live_migrate_server(server["id"], host=None, block_migration="auto")
        return move

    def has_moved(self, move: Move) -> bool:
        """Waits until the migration is over."""
        self.migration(move, OVER)
        waiters.wait_for_server_status(self.os_admin.servers_client, move.server, "ACTIVE")
        return bool(self.get_host_for_server(move.server) != move.source)

    def migration(self, move: Move, states: tuple[str, ...]) -> dict[str, Any]:
        """What Nova says of it, once it is in one of these states. Nova makes it a while after it was asked to."""
        found: dict[str, Any] = {}

        def is_there() -> bool:
            found.update(next(iter(self.migrations(move.server)[move.number :]), {}))
            return found.get("status") in states

        if not test_utils.call_until_true(is_there, CONF.compute.build_timeout, LOOK_SECONDS):
            raise lib_exc.TimeoutException(f"the migration of {move.server} is {found.get('status')}")
        return found

    def migrations(self, server: str) -> list[dict[str, Any]]:
        """All of a server, the oldest first."""
        known = self.os_admin.migrations_client.list_migrations()["migrations"]
        return sorted((one for one in known if one["instance_uuid"] == server), key=lambda one: one["id"])

    def assert_lives(self, download: Download) -> None:
        """What the peer says from now on gets through."""
        silence = download.silence(CONF.sami.stall_seconds)
        assert silence <= CONF.sami.stall_seconds, f"nothing got through for {silence:.1f} s"

    @decorators.idempotent_id("5b0a3c9e-6c43-4f0a-8d55-0e5f4d1c7b21")
    @decorators.attr(type="slow")
    def test_connection_survives_the_way_there_and_back(self) -> None:
        with self.download() as (server, download):
            for _ in range(2):
                assert self.has_moved(self.migrate(server))
                self.assert_lives(download)

    @decorators.idempotent_id("c1f6a9d4-93e7-4a67-b0c4-7d2e8a5f3e10")
    @decorators.attr(type="slow")
    def test_connection_survives_a_migration_that_is_aborted(self) -> None:
        with self.download() as (server, download):
            move = self.migrate(server)
            migration = self.migration(move, RUNNING)
            # It may be over before Nova hears of it, and has moved then.
            with contextlib.suppress(lib_exc.BadRequest, lib_exc.Conflict, lib_exc.NotFound):
                self.os_admin.servers_client.delete(f"servers/{server['id']}/migrations/{migration['id']}")
            self.has_moved(move)
            self.assert_lives(download)

    @decorators.idempotent_id("e07d2b58-41a9-4f3b-9a8c-2b6c0d9e4f73")
    @decorators.attr(type="slow")
    def test_connections_survive_when_many_move_at_once(self) -> None:
        with contextlib.ExitStack() as stack:
            downloads = [stack.enter_context(self.download()) for _ in range(CONF.sami.servers)]
            moves = [self.migrate(server) for server, _ in downloads]
            for move, (_, download) in zip(moves, downloads, strict=True):
                assert self.has_moved(move)
                self.assert_lives(download)


def _own_address(server: str, family: socket.AddressFamily) -> str:
    """The address that this host reaches the server from."""
    with socket.socket(family, socket.SOCK_DGRAM) as route:
        route.connect((server, 9))
        return str(route.getsockname()[0])
