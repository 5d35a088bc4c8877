"""The README is part of the program: what it names must exist, and what exists must be named."""

import re
import subprocess
from pathlib import Path

from l40sd.cli.main import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_command_is_in_the_readme() -> None:
    block = README.split("## Commands")[1].split("```")[1]
    assert "switch-pattern" in cli.commands
    assert [command for command in cli.commands if not re.search(rf"\b{command}\b", block)] == []


def test_every_file_that_the_readme_points_to_is_there() -> None:
    targets = [*re.findall(r"\]\(((?!https?:)[^)#]+)\)", README), *re.findall(r"`?(scripts/[a-z_.-]+)", README)]
    assert "docs/status.svg" in targets
    assert [target for target in targets if not (ROOT / target.rstrip(".")).exists()] == []


def test_the_demo_tells_what_it_is_without_installing_anything(tmp_path: Path) -> None:
    """`scripts/demo --help` fetched 221 MB first."""
    copy = tmp_path / "scripts"
    copy.mkdir()
    (copy / "demo").write_bytes((ROOT / "scripts/demo").read_bytes())
    (copy / "setup").write_text("touch was-set-up\n")
    for name in ("demo", "setup"):
        (copy / name).chmod(0o755)
    for argument, code in (("--help", 0), ("-h", 0), ("--stop", 0), ("--nonsense", 2)):
        done = subprocess.run([copy / "demo", argument], capture_output=True, timeout=20)  # noqa: TID251  no loop here
        assert done.returncode == code
        assert done.stdout or done.stderr
    assert not (tmp_path / "was-set-up").exists()


def installed(tmp_path: Path, function: str) -> str:
    """Run one function of scripts/install with its places moved below ``tmp_path``; return what it says."""
    text = (ROOT / "scripts/install").read_text(encoding="utf-8")
    text = text.replace('\nmain "$@"\n', "\n").replace('SOURCE=$(cd "$(dirname "$0")/.." && pwd)', f"SOURCE={ROOT}")
    for place in ("/opt/l40sd", "/etc/l40sd/l40sd.toml"):
        text = text.replace(f"={place}", f"={tmp_path}{place}")
    steps = f'systemd-tmpfiles() {{ :; }}; chgrp() {{ :; }}; mkdir -p "$HOME_DIR"; {function}'
    return subprocess.check_output(["bash", "-c", f"{text}\n{steps}"], text=True, timeout=20)


def test_the_installed_readme_points_to_what_is_installed(tmp_path: Path) -> None:
    """Its links led nowhere: only the README itself was copied."""
    installed(tmp_path, "install_documentation")
    home = tmp_path / "opt/l40sd"
    targets = re.findall(r"\]\(((?!https?:)[^)#]+)\)", (home / "README.md").read_text(encoding="utf-8"))
    assert "ARCHITECTURE.md" in targets
    assert [target for target in targets if not (home / target).exists()] == []
    manifest = (home / "manifest.new").read_text().splitlines()
    assert f"{home}/docs/status.svg" in manifest


def test_an_upgrade_puts_a_new_default_configuration_beside_the_old(tmp_path: Path) -> None:
    """Options that a release had brought could be found in its archive only."""
    both = "install_config; install_documentation"
    config, beside = tmp_path / "etc/l40sd/l40sd.toml", tmp_path / "etc/l40sd/l40sd.toml.new"
    default = (ROOT / "etc/l40sd.toml").read_text()
    assert "Wrote" in installed(tmp_path, both)
    config.write_text("mine\n")
    installed(tmp_path, both)
    assert (config.read_text(), beside.exists()) == ("mine\n", False), "the default is what it was"
    (tmp_path / "opt/l40sd/etc/l40sd.toml").write_text("of the release before\n")
    assert f"diff {config} {beside}" in installed(tmp_path, both)
    assert (config.read_text(), beside.read_text()) == ("mine\n", default)
