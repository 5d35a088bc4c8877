"""Builds what the systemd tests boot: a Debian or Ubuntu root file system, and the wheels installed in it.

Both are made once, from this machine's own apt and pip sources, and kept in ``.cache/systemd``; the folder's
name is a hash of the recipe, so a changed recipe builds anew and an unchanged one costs nothing.

    python tests/systemd/image.py            build both, say where they are

``L40SD_TEST_SUITE`` names another release than this machine's own (``trixie``, ``noble``, ...) as far as the
machine's apt sources carry it.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = REPOSITORY / ".cache" / "systemd"
BUILD_TIMEOUT_S = 600.0
PACKAGES = "systemd,systemd-sysv,dbus,polkitd,python3,python3-venv,numactl,procps,curl"  # what a server has
PYTHONS = {"bookworm": "3.11", "trixie": "3.13", "noble": "3.12"}
"""The release's own python3: wheels are fetched for it, whatever runs these tests."""

# Nothing that fires on its own during a test, no login prompt that waits for a terminal that is not there.
_MASKED = (
    "apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer "
    "dpkg-db-backup.timer getty.target console-getty.service systemd-timesyncd.service "
    "systemd-networkd-wait-online.service"
)
CUSTOMIZE = f"""set -e
echo l40stest > "$1/etc/hostname"
printf '127.0.0.1 localhost l40stest\\n' > "$1/etc/hosts"
for unit in {_MASKED}; do ln -sf /dev/null "$1/etc/systemd/system/$unit"; done
: > "$1/etc/machine-id"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A root file system that is never written to, and the wheels for its Python."""

    suite: str
    root: Path
    wheels: Path


def missing_tools() -> str:
    """Return why the container cannot be built or run here, in one sentence; empty when it can."""
    if os.geteuid() != 0:
        return "the systemd tests need root: they boot a container with systemd as PID 1"
    absent = [tool for tool in ("mmdebstrap", "systemd-nspawn", "nsenter") if shutil.which(tool) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install --no-install-recommends mmdebstrap systemd-container"
    if not any(kind == "cgroup2" for kind, _ in hierarchies()):
        return "no cgroup2 mount on this machine"
    return ""


def hierarchies() -> list[tuple[str, Path]]:
    """Return kind and mount of the trees in which systemd keeps processes: ``cgroup2``, ``named`` (hybrid) or both."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        before, _, after = line.partition(" - ")
        if after.startswith("cgroup2 "):
            found.append(("cgroup2", Path(before.split()[4])))
        elif "name=systemd" in after:
            found.append(("named", Path(before.split()[4])))
    return found


def build() -> Image:
    """Return the image, built if it is not there yet (about 60 s).

    Raises:
        RuntimeError: mmdebstrap or pip failed; the message ends with the last lines of its log.
    """
    suite, sources = suite_and_sources()
    root = once(
        f"root-{suite}",
        (PACKAGES, CUSTOMIZE, sources),
        lambda target, log: debootstrap(suite, sources, PACKAGES, CUSTOMIZE, target, log),
    )
    return Image(suite=suite, root=root, wheels=wheels_for(suite))


INSTALLED = ("l40sd", "systemd", "scripts", "etc")
"""What scripts/install needs of a checkout, besides three files at its top."""


def copy_source(target: Path) -> None:
    """Copy the checkout as a user has it, without this machine's virtual environment and caches."""
    target.mkdir(exist_ok=True)
    for name in INSTALLED:
        shutil.copytree(REPOSITORY / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, target / name)


def suite_and_sources() -> tuple[str, str]:
    own = os_release("VERSION_CODENAME")
    suite = os.environ.get("L40SD_TEST_SUITE", own)
    return suite, _apt_sources().replace(own, suite)


def wheels_for(suite: str) -> Path:
    python = PYTHONS.get(suite, f"{sys.version_info.major}.{sys.version_info.minor}")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    needed = [*project["project"]["dependencies"], *project["build-system"]["requires"], "wheel"]
    return once(f"wheels-{python}", (*needed, python), lambda target, log: _download(needed, python, target, log))


def debootstrap(suite: str, sources: str, packages: str, customize: str, target: Path, log: Path, *more: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        listing = Path(folder) / ("image.sources" if "Types:" in sources else "image.list")
        listing.write_text(sources, encoding="utf-8")
        hook = Path(folder) / "customize.sh"
        hook.write_text(customize, encoding="utf-8")
        slim = [f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("doc", "man", "locale")]
        # An image of an archived release carries old dates; it is used offline and for tests only.
        dates = ["--aptopt=Acquire::Check-Valid-Until false", "--aptopt=Acquire::Languages none"]
        logged(
            ["mmdebstrap", "--variant=minbase", "--mode=root", f"--include={packages}", *slim, *dates, *more,
             f"--customize-hook=sh {hook} \"$1\"", suite, str(target), str(listing)],
            log,
        )  # fmt: skip


def _download(needed: Sequence[str], python: str, target: Path, log: Path) -> None:
    tags = [f"--platform=manylinux_2_{minor}_{os.uname().machine}" for minor in (17, 26, 28, 34)]
    logged(
        [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", f"--python-version={python}",
         *tags, f"--platform=manylinux2014_{os.uname().machine}", f"--dest={target}", *needed],
        log,
    )  # fmt: skip


def once(name: str, recipe: Sequence[str], make: Callable[[Path, Path], None]) -> Path:
    """Return the cached folder of this recipe; built beside it and renamed, so a half-built one is never used."""
    digest = hashlib.sha256("\0".join(recipe).encode()).hexdigest()[:12]
    final = CACHE / f"{name}-{digest}"
    if not final.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        half = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=CACHE))
        half.chmod(0o755)
        try:
            make(half, CACHE / f"{name}.log")
            half.rename(final)
        finally:
            shutil.rmtree(half, ignore_errors=True)  # where it was not renamed
    return final


def logged(argv: Sequence[str], log: Path) -> None:
    with log.open("wb") as output:
        done = subprocess.run(  # noqa: TID251 - a build step, nothing else runs meanwhile
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=BUILD_TIMEOUT_S,
            check=False,
        )  # fmt: skip
    if done.returncode != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{argv[0]} failed ({done.returncode}); the end of {log}:\n{tail}")


def _apt_sources() -> str:
    """Return the distribution's own entries among this machine's apt sources."""
    folder = Path("/etc/apt/sources.list.d")
    named = [folder / f"{os_release('ID')}.sources", Path("/etc/apt/sources.list")]
    for path in named:
        if path.is_file() and (text := path.read_text(encoding="utf-8").strip()):
            return text + "\n"
    raise RuntimeError(f"no apt sources found in {' or '.join(map(str, named))}")


def os_release(key: str) -> str:
    for line in Path("/etc/os-release").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition("=")
        if name == key:
            return value.strip('"')
    raise RuntimeError(f"/etc/os-release has no {key}")


if __name__ == "__main__":
    if reason := missing_tools():
        raise SystemExit(reason)
    image = build()
    print(f"{image.root}\n{image.wheels}")  # noqa: T201 - the answer of this little program
