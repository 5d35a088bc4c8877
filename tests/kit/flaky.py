"""An engine that dies on GPUs which stand in a file: the simulated one behind a line of shell that execs it."""

from pathlib import Path

SCRIPT = (
    "for gpu in $(cat {folder}/dead 2>/dev/null); do"
    " case $CUDA_VISIBLE_DEVICES in *$gpu*) echo dead GPU; exit 3;; esac; done;"
    ' exec "$0" -m l40sd.sim.engine --model "$1" --host {{host}} --port {{port}} --ranks {{ranks}} --drain-s 10'
    " --start-delay-s $(cat {folder}/delay 2>/dev/null || echo 0)"
)


def engine(folder: Path) -> str:
    """Return the table of engine ``flaky``.

    Args:
        folder: ``dead`` in it has the UUIDs of dead GPUs, ``delay`` the seconds that a start takes; if they are there.
    """
    script = SCRIPT.format(folder=folder)
    return f"""
[engines.flaky]
base = "simulated"
command = ["sh", "-c", '''{script}''', "{{python}}", "{{name}}"]
"""
