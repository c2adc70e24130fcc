"""Learned parts of methods: small modules and artefacts that are trained once and then only read."""
