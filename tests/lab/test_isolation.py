import json
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lab.deadline import wait_until
from lab.isolation import SBIN

IN_A_WORLD = [sys.executable, "-m", "lab.isolation", "--"]

BUSY = """
import os, signal, sys
from lab import traffic
from lab.lab import Lab
with Lab() as lab:
    traffic.download(lab, lab.add_guest("g", "a"))
    print(os.stat("/proc/self/ns/mnt").st_ino, os.stat("/proc/self/ns/pid").st_ino, flush=True)
    signal.pause()
"""


@pytest.fixture
def world():
    """Shadows conftest's: these tests make worlds of their own, in one or not."""


def processes_in(kind: str, inode: int) -> list[str]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                if os.stat(f"/proc/{entry}/ns/{kind}").st_ino == inode:
                    found.append(entry)
            except OSError:
                continue
    return found


def first_line(process: subprocess.Popen) -> str:
    readable, _, _ = select.select([process.stdout], [], [], 20)
    assert readable, "nothing said in 20 s"
    return process.stdout.readline()


def test_exit_code_is_passed_back():
    assert subprocess.run([*IN_A_WORLD, "sh", "-c", "exit 7"], check=False).returncode == 7


def test_death_by_a_signal_is_passed_back():
    assert subprocess.run([*IN_A_WORLD, "sh", "-c", "kill -TERM $$"], check=False).returncode == -signal.SIGTERM


def test_no_such_command_is_127():
    done = subprocess.run([*IN_A_WORLD, "no-such-command"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (127, "no-such-command: No such file or directory\n")


def test_signals_are_passed_on():
    script = "trap 'exit 9' TERM; echo up; while :; do sleep 0.05; done"
    with subprocess.Popen([*IN_A_WORLD, "sh", "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert first_line(process) == "up\n"
        process.terminate()
        assert process.wait(20) == 9


def test_a_world_has_its_own_run_proc_and_sys():
    script = "ls /run /sys/class/net; ps -e -o comm= | wc -l"
    done = subprocess.run([*IN_A_WORLD, "sh", "-c", script], check=True, capture_output=True, text=True)
    # Pid 1, sh, ps, wc.
    assert done.stdout.split() == ["/run:", "/sys/class/net:", "lo", "4"]


def mounts() -> list[str]:
    """All but those that other tests make and end beside this one."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if " /run/" not in line and "/sami-clone-" not in line]


def test_a_killed_world_leaves_nothing():
    before = mounts()
    with subprocess.Popen([*IN_A_WORLD, sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True) as process:
        mount, pid = map(int, first_line(process).split())
        # Pid 1, the script, two processes of the download at least.
        assert len(processes_in("pid", pid)) >= 4
        process.kill()
        process.wait()
    # With its processes go its mounts, and with its mounts the network namespaces: nothing else holds them.
    wait_until(lambda: not processes_in("pid", pid) and not processes_in("mnt", mount), "the world to end")
    assert mounts() == before


def test_a_world_that_dies_with_its_parent_leaves_nothing():
    inner = [*IN_A_WORLD[:-1], "--with-parent", "--", sys.executable, "-c", BUSY]
    parent = f"import signal, subprocess; child = subprocess.Popen({inner!r}); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        mount, pid = map(int, first_line(process).split())
        process.kill()
        process.wait()
        wait_until(lambda: not processes_in("pid", pid) and not processes_in("mnt", mount), "the world to end")


@pytest.mark.usefixtures("machine_root")
def test_an_ordinary_user_has_a_lab_too(open_clone):
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    pythons = [open_clone / ".venv/bin/python", shutil.which("python3", path=SBIN)]
    # Through env: setpriv itself still has the capability to read what nobody may not.
    usable = [
        each
        for each in filter(None, pythons)
        if subprocess.run([*nobody, "env", each, "-c", ""], check=False, stderr=subprocess.DEVNULL).returncode == 0
    ]
    assert usable, f"nobody may run none of {pythons}"
    script = """
from lab.lab import Lab
from lab import addresses
with Lab() as lab:
    guest = lab.add_guest("g", "a")
    guest.run(["ping", "-c1", "-W2", addresses.OUTSIDE_V4])
    lab.migrate(guest, "a", "b", copy_seconds=0)
    guest.run(["ping", "-c1", "-W2", addresses.OUTSIDE_V6])
print("moved")
"""
    done = subprocess.run(
        [*nobody, usable[0], "-B", "-m", "lab.isolation", "--", usable[0], "-B", "-c", script],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"HOME": "/"},
        cwd=open_clone,
    )
    assert (done.stdout, done.stderr) == ("moved\n", "")


def refused(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python where the kernel gives no namespaces."""
    python = f"exec setpriv --bounding-set=-all --inh-caps=-all {sys.executable} {' '.join(map(str, arguments))}"
    script = f"echo 0 > /proc/sys/user/max_user_namespaces; {python}"
    argv = ["unshare", "--user", "--map-root-user", "sh", "-c", script]
    return subprocess.run(argv, check=False, capture_output=True, text=True)


def test_a_kernel_that_refuses_is_named_with_the_mend():
    done = refused("-m", "lab.isolation", "--", "true")
    assert done.returncode == 125
    assert "the lab cannot run here" in done.stderr
    assert "user.max_user_namespaces" in done.stderr


def test_demo_where_the_kernel_refuses_shows_the_memory_driver_and_says_so(tmp_path):
    done = refused("-m", "lab.demo", "--case", "a", "f", "--output", tmp_path)
    assert done.returncode == 125
    assert "user.max_user_namespaces" in done.stderr
    assert "memory driver: no kernel, no packets" in done.stdout
    made = json.loads((tmp_path / "result.json").read_text())
    assert made["label"] == "memory driver: no kernel, no packets"
    assert [(case["without"]["survived"], case["with"]["survived"]) for case in made["cases"]] == [(False, True)] * 2


def test_a_lab_outside_of_a_world_says_what_to_run():
    environment = {name: value for name, value in os.environ.items() if name != "SAMI_LAB_WORLD"}
    done = subprocess.run(
        [sys.executable, "-c", "from lab.lab import Lab\nwith Lab(): pass"],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert "python -m lab.isolation -- COMMAND" in done.stderr
