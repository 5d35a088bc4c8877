"""The end of the shared host: uninstalling under a running daemon. In a file of its own so that it comes last."""

import pytest
from container import Container
from test_daemon import STOP_TIMEOUT_S, processes_of_l40sd, wait_until_ready

pytestmark = pytest.mark.systemd


def test_uninstall_ends_a_running_daemon_and_its_workers(host: Container) -> None:
    host.run("systemctl start l40sd")
    wait_until_ready(host)
    host.run("/opt/l40sd/uninstall", timeout_s=STOP_TIMEOUT_S)
    assert processes_of_l40sd(host) == ""
    assert host.run("test -e /run/l40sd -o -e /opt/l40sd -o -e /run/l40s-start.sock", check=False).returncode == 1
