"""The fault suite: every fault that a user may expect l40sd to survive, injected for real. Run it by scripts/faults."""
