"""How large models are."""
