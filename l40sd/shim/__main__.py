"""``python -m l40sd.shim INSTANCE_DIR``."""

import sys

from l40sd.shim.watcher import main

sys.exit(main(sys.argv))
