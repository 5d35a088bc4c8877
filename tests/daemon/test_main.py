"""The program l40sd: its exit status says what systemd has to know, whatever becomes of its words."""

import subprocess
import sys
from pathlib import Path

import pytest

GOOD = "[models.m]\nengine = 'simulated'\n[host]\ninventory = 'l40s-8'\n"


def ended(folder: Path, config: str, redirection: str, **environ: str) -> tuple[int, str]:
    """Run ``l40sd --check-config`` below a shell that redirects its output; return exit status and output."""
    file = folder / "l40sd.toml"
    file.write_text(config)
    program = [sys.executable, "-m", "l40sd", "--check-config", "--config", str(file)]
    done = subprocess.run(  # noqa: TID251 - no loop here
        ["sh", "-c", f'"$@" {redirection}', "sh", *program], capture_output=True, timeout=30, env=environ or None
    )
    return done.returncode, (done.stdout + done.stderr).decode()


@pytest.mark.parametrize("redirection", [">/dev/full", "2>/dev/full", ">&-", "2>&-", ">/dev/full 2>&1"])
@pytest.mark.parametrize(
    ("config", "status"), [(GOOD, 0), ("[proxxy]\n", 78), (GOOD + "[daemon]\npattern = 'Z'\n", 78)]
)
def test_a_bad_configuration_is_78_also_on_a_full_disk(
    tmp_path: Path, redirection: str, config: str, status: int
) -> None:
    """With 1 in its place systemd would start it again every second."""
    code, said = ended(tmp_path, config, redirection)
    assert (code, "Traceback" in said) == (status, False)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ("[proxy]\napi_keys_file = '/none/keys'\n", "/none/keys: cannot be read"),
        ("", ""),
    ],
)
def test_the_check_before_an_upgrade_sees_the_files_that_a_start_would_refuse(
    tmp_path: Path, more: str, what: str
) -> None:
    """The new release approved of the configuration, took over, and ended with 78."""
    code, said = ended(tmp_path, GOOD + more, "")
    assert code == (78 if what else 0)
    assert what in said


def test_ctrl_c_while_it_is_imported_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    assert ended(tmp_path, GOOD, "", PYTHONPATH=str(tmp_path)) == (130, "")
