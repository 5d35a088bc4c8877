"""``python -m l40sd`` is ``l40sd``."""

from l40sd.daemon import main

main()
