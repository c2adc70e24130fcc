"""Hosts of diffusers; the only importers of it."""
