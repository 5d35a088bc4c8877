"""`scripts/install` and `scripts/uninstall` on a host of their own, one after the other."""

import re

import pytest
from container import Container

pytestmark = pytest.mark.systemd

INSTALL = "/src/scripts/install --wheels /wheels"
INSTALL_TIMEOUT_S = 180.0
UNITS = "/usr/local/lib/systemd/system"
PLACES = "/etc /opt /usr /root /home /srv /var/lib /var/log /var/spool /var/mail /run"
# What any host's own programs write as they go, and the spare copies that adduser leaves of the files it changes.
_OF_NO_INTEREST = re.compile(
    r"^(/etc/(passwd|group|shadow|gshadow|subuid|subgid)-?|/etc/\.(pwd\.lock|updated)|/etc/ld\.so\.cache|/etc/mtab"
    r"|/var/log/(journal/|lastlog|faillog|wtmp|btmp).*|/var/lib/systemd/.*|/run/(systemd|udev|dbus|log|user|lock)/.*"
    r"|.*/__pycache__(/.*)?)$"
)


def files_of(host: Container) -> dict[str, str]:
    """Return every path with its kind, mode, owner, group and, for a link, its target."""
    text = host.output(f"find {PLACES} -xdev -printf '%p\\t%y %m %u %g %l\\n' 2>/dev/null")
    rows = (line.partition("\t")[::2] for line in text.splitlines())
    return {path: facts for path, facts in rows if not _OF_NO_INTEREST.match(path)}


def accounts_of(host: Container) -> str:
    return host.output("cat /etc/passwd; getent group; cut -d: -f1 /etc/shadow /etc/gshadow")


@pytest.fixture(scope="session")
def before(bare: Container) -> tuple[dict[str, str], str]:
    """What the host looked like before anything was installed."""
    return files_of(bare), accounts_of(bare)


def test_one_command_installs_all_of_it(bare: Container, before: object) -> None:
    said = bare.run(INSTALL, timeout_s=INSTALL_TIMEOUT_S).stdout
    assert "systemctl enable --now l40sd" in said
    assert bare.output("l40sd --version").startswith("l40sd")
    bare.run("l40sctl --help")
    assert bare.output("stat -c '%a %U %G' /etc/l40sd/l40sd.toml") == "640 root l40sd"
    assert "_l40sctl" in bare.output("cat /usr/local/share/bash-completion/completions/l40sctl")
    assert bare.show("l40sd.service", "LoadState", "UnitFileState") == {
        "LoadState": "loaded", "UnitFileState": "disabled"
    }  # fmt: skip
    home = bare.output("getent passwd l40sd | cut -d: -f6,7")
    assert home == "/var/lib/l40sd:/usr/sbin/nologin"


def test_the_shipped_configuration_passes_its_own_check_as_the_daemon_user(bare: Container) -> None:
    bare.run("l40sd --check-config", user="l40sd")


def test_drop_ins_are_those_that_this_systemd_knows(bare: Container) -> None:
    version = int(bare.output("systemctl --version | sed -n '1s/^systemd \\([0-9]*\\).*/\\1/p'"))
    installed = bare.output(f"cd {UNITS} && ls l40sd.service.d 2>/dev/null || true").split()
    assert installed == [f"systemd-{known}.conf" for known in (253, 254) if known <= version]
    assert bare.show("l40sd.service", "Type")["Type"] == ("notify-reload" if version >= 253 else "notify")


def test_installing_again_is_an_upgrade(bare: Container) -> None:
    """The configuration stays; so does the release that a process still runs from, and one to go back to."""
    bare.run("echo '# mine' >> /etc/l40sd/l40sd.toml")
    users = bare.output("getent passwd l40sd; getent group l40sd")
    releases = [bare.output("readlink /opt/l40sd/current")]
    with bare.background(f"exec /opt/l40sd/{releases[0]}/bin/python -c 'print(1, flush=True); input()'") as old:
        assert old.stdout is not None
        assert old.stdout.readline() == "1\n"
        for _ in range(2):
            bare.run(INSTALL, timeout_s=INSTALL_TIMEOUT_S)
            releases.append(bare.output("readlink /opt/l40sd/current"))
        assert set(bare.output("cd /opt/l40sd && ls -d release-*").split()) == set(releases)
    assert len(set(releases)) == 3
    bare.run(INSTALL, timeout_s=INSTALL_TIMEOUT_S)
    releases.append(bare.output("readlink /opt/l40sd/current"))
    assert set(bare.output("cd /opt/l40sd && ls -d release-*").split()) == set(releases[-2:])
    assert bare.output("tail -n 1 /etc/l40sd/l40sd.toml") == "# mine"
    assert bare.output("getent passwd l40sd; getent group l40sd") == users


def test_a_polkit_without_rules_gets_the_drop_in_and_no_rule_is_left(bare: Container) -> None:
    """Ubuntu 22.04's version; what an install with another polkit had put there goes."""
    rule, drop_in = "/etc/polkit-1/rules.d/50-l40sd.rules", f"{UNITS}/l40sd.service.d/no-polkit-rules.conf"
    bare.run(f"test -e {rule} -a ! -e {drop_in}")
    bare.write("/usr/local/sbin/pkaction", "#!/bin/sh\necho pkaction version 0.105\n")
    bare.run("chmod +x /usr/local/sbin/pkaction")
    bare.run(INSTALL, timeout_s=INSTALL_TIMEOUT_S)
    bare.run(f"test ! -e {rule} -a -e {drop_in} -a ! -e {UNITS}/l40s-start.socket")
    assert bare.show("l40sd.service", "KillMode", "Delegate") == {"KillMode": "process", "Delegate": "yes"}
    bare.run("rm /usr/local/sbin/pkaction")
    bare.run(INSTALL, timeout_s=INSTALL_TIMEOUT_S)
    bare.run(f"test -e {rule} -a ! -e {drop_in}")


def test_a_failed_installation_changes_nothing(bare: Container) -> None:
    before = files_of(bare)
    failed = bare.run("/src/scripts/install --wheels /root", check=False, timeout_s=INSTALL_TIMEOUT_S)
    assert failed.returncode == 1
    assert "pip could not install l40sd" in failed.stderr
    after = files_of(bare)
    assert {path for path in before | after if before.get(path) != after.get(path)} <= {"/opt/l40sd/manifest.new"}
    bare.run("l40sd --version")


def test_only_root_installs(bare: Container) -> None:
    for script in ("install", "uninstall"):
        refused = bare.run(f"/src/scripts/{script}", user="nobody", check=False)
        assert refused.returncode == 1
        assert "must run as root" in refused.stderr
        assert "hint: sudo" in refused.stderr


def test_uninstall_keeps_what_is_the_operators(bare: Container) -> None:
    bare.run("/opt/l40sd/uninstall")
    assert bare.output("tail -n 1 /etc/l40sd/l40sd.toml") == "# mine"
    assert bare.output("ls -d /opt/l40sd /usr/local/bin/l40s* 2>/dev/null; true") == ""
    assert bare.show("l40sd.service", "LoadState")["LoadState"] == "not-found"


def test_uninstall_with_purge_leaves_the_host_as_it_was(bare: Container, before: tuple[dict[str, str], str]) -> None:
    bare.run(INSTALL, timeout_s=INSTALL_TIMEOUT_S)
    bare.run("/src/scripts/uninstall --purge")
    files, accounts = before
    after = files_of(bare)
    assert {path: after.get(path) for path in files | after if files.get(path) != after.get(path)} == {}
    assert accounts_of(bare) == accounts
