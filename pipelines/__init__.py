"""Assemblies: a checkpoint and a processor made into something one can call."""
