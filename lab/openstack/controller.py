"""The controller: MariaDB, Keystone, Placement, Glance, Neutron's server, and Nova's but nova-compute."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lab.deadline import wait_until
from lab.errors import CommandFailed
from lab.libvirt.machine import Machine
from lab.namespace import Namespace
from lab.openstack import addresses, settings
from lab.openstack.parts import PYTHON, SCRIPTS
from lab.openstack.service import HOME, Service, environment
from lab.openstack.settings import CONTROLLER, DATA, DATABASES, MYSQL_SOCKET, PASSWORD, PORTS, REGION, URLS

DATABASE_SECONDS = 120.0
POLL_SECONDS = 0.1
NEUTRON = ("--config-file", "/etc/neutron/neutron.conf", "--config-file", "/etc/neutron/ml2.ini")
# A client keeps a connection that uwsgi closes without a word; then services die at their start now and then.
UWSGI = (
    "uwsgi --plugin python3 --master --processes 1 --threads 4 --enable-threads --buffer-size 65535 --die-on-term "
    "--need-app --disable-logging --socket-timeout 60 --add-header Connection:close"
)


class Controller(Machine):
    """One controller. Its services come in the order of the methods."""

    def __init__(self, namespace: Namespace, lab_folder: Path) -> None:
        super().__init__(namespace, addresses.CONTROLLER, lab_folder, addresses.UNDERLAY)
        self.data = self.folder / DATA.name
        wsgi = {name: f"/usr/bin/{script}" for name, script in WSGI_SCRIPTS.items()}
        programs = {
            "mariadb": ["mariadbd", "--defaults-file=/etc/mysql.cnf"],
            **{
                name: [*UWSGI.split(), "--http-socket", f"{CONTROLLER}:{PORTS[name]}", "--wsgi-file", script]
                for name, script in wsgi.items()
            },
            "neutron-server": [PYTHON, SCRIPTS / "neutron-server", *NEUTRON],
            "glance-api": [PYTHON, SCRIPTS / "glance-api", "--config-file", "/etc/glance/glance-api.conf"],
            **{name: [PYTHON, SCRIPTS / name] for name in ("nova-conductor", "nova-api", "nova-scheduler")},
        }
        self.services = {name: Service(self, name, argv) for name, argv in programs.items()}

    def start_database(self) -> None:
        """With what is in `data`, or, if there is nothing, empty. Blocks until it answers."""
        self.data.mkdir(exist_ok=True)
        is_new = not (self.data / "mysql").exists()
        if is_new:
            self._do(
                "mariadb-install-db",
                "--defaults-file=/etc/mysql.cnf",
                "--auth-root-authentication-method=normal",
                "--skip-test-db",
            )
        self.services["mariadb"].start()
        wait_until(self._database_answers, "MariaDB to answer", DATABASE_SECONDS, poll_seconds=POLL_SECONDS)
        if is_new:
            made = "".join(f"create database {name} character set utf8;" for name in DATABASES)
            self.sql(f"{made} grant all on *.* to root@'%' identified by '{PASSWORD}' with grant option;")

    def stop_database(self) -> None:
        """Blocks until its files are whole."""
        self.sql("shutdown")
        self.services["mariadb"].stop()

    def sql(self, text: str) -> str:
        """What MariaDB answers. Raises CommandFailed."""
        return self.run(["mariadb", f"--socket={MYSQL_SOCKET}", "-u", "root", "-e", text])

    def make_schemas(self) -> None:
        """Of all databases, and Keystone's keys. Blocks half a minute and more."""
        (self.data / "images").mkdir()
        for name in ("fernet", "credential"):
            (self.data / "keystone" / name).mkdir(parents=True)
        # As many at a time as the machine has processors; Neutron's alone takes as long as all others.
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda make: make(), (self._make_neutrons, self._make_others)))

    def _make_neutrons(self) -> None:
        self._do(PYTHON, SCRIPTS / "neutron-db-manage", *NEUTRON, "upgrade", "heads")

    def _make_others(self) -> None:
        root = ("--keystone-user", "root", "--keystone-group", "root")
        self._do("keystone-manage", "db_sync")
        self._do("keystone-manage", "fernet_setup", *root)
        self._do("keystone-manage", "credential_setup", *root)
        urls = [f"--bootstrap-{interface}-url={URLS['identity']}" for interface in ("admin", "internal", "public")]
        self._do(
            "keystone-manage", "bootstrap", f"--bootstrap-password={PASSWORD}", f"--bootstrap-region-id={REGION}", *urls
        )
        self._do("placement-manage", "db", "sync")
        self._do(PYTHON, SCRIPTS / "glance-manage", "--config-file", "/etc/glance/glance-api.conf", "db_sync")
        self.manage_nova("api_db", "sync")
        self.manage_nova("cell_v2", "map_cell0", "--database_connection", settings.database("nova_cell0"))
        self.manage_nova("cell_v2", "create_cell", "--name=cell1")
        self.manage_nova("db", "sync")

    def manage_nova(self, *words: str) -> None:
        """Run nova-manage. Raises CommandFailed."""
        self._do(PYTHON, SCRIPTS / "nova-manage", *words)

    def start(self, argv: Sequence[str | Path], **options: Any) -> subprocess.Popen:
        """As a machine's, with a service's environment unless another is given."""
        return super().start(argv, **({"env": environment()} | options))

    def _do(self, *argv: str | Path) -> None:
        self.run(argv)

    def _database_answers(self) -> bool:
        self.services["mariadb"].check()
        try:
            self.sql("select 1")
        except CommandFailed:
            return False
        return True

    def _write_files(self) -> None:
        super()._write_files()
        write(self.folder / "etc", settings.controller())
        (self.folder / Path(HOME).name).mkdir()


WSGI_SCRIPTS = {"keystone": "keystone-wsgi-public", "placement": "placement-api"}


def write(etc: Path, files: Mapping[str, str]) -> None:
    """Files below an /etc, by path."""
    for path, words in files.items():
        (etc / path).parent.mkdir(parents=True, exist_ok=True)
        (etc / path).write_text(words)
