"""The shim: one small process per worker that outlives the daemon.

``python -m l40sd.shim INSTANCE_DIR`` is parent and subreaper of one engine. It needs nothing but the standard
library, keeps no connection to the daemon, and everything that the two tell each other goes through files:

    spec.json   written by the daemon before anything else: what to run (the write-ahead record)
    run.json    written by the shim once the engine's exec has succeeded: who runs
    exit.json   written by the shim when nobody is left: how it ended
    stop.json   written by the daemon before SIGTERM, where this stop is another than the spec's: see below
    signals     SIGTERM: the stop ladder; SIGQUIT: kill everything now
    lease       the daemon's lock file: free for longer than orphan_grace_s, and the engine is stopped

The stop ladder: SIGTERM to the engine, or to its whole process group where ``term_to`` in stop.json or the spec is
``group``; once the leader is gone, SIGTERM to whoever is left; ``term_timeout_s`` after the first, everything is
killed. Whoever is still putting things in order has all of that time. The engine is the leader, or behind a wrapper
that does not ``exec`` the process that it runs: see ``proc.who_obeys``. An engine that serves nobody yet has nothing to
put in order, and what it is loading with may not listen: then the daemon says ``group``.

Once nobody is left, the run's temporary folder (``tmp`` in the spec) goes, and what it left in shared memory.

``watcher`` is the process; ``engine`` starts what it watches, ``output`` keeps the log files, ``leftovers`` clears up.
``proc`` and ``cgroup`` find and kill processes; the daemon uses these three too, for what a dead shim left behind.
"""

INSTANCE_VARIABLE = "L40SD_INSTANCE"
RUNTIME_VARIABLE = "L40SD_RUNTIME_DIR"
"""In the environment of the shim and of its engine: whose they are, for when no other record is left."""
OWN_GROUP = "own"
"""In a spec: the cgroup that the shim is started in is the instance's, as in a unit with Delegate=yes."""
TERM_GROUP = "group"
"""In a spec's ``term_to``: SIGTERM goes to the whole process group; anything else, or nothing: to the engine."""
PROTOCOL = 1
"""Version of the three files; a daemon adopts shims of its own and of older versions."""
