"""Configurations: each module's `get_config()` returns a `harmonic.config.Config`."""
