"""Connectors to serving engines: an engine-neutral core, and thin adapters over it."""
