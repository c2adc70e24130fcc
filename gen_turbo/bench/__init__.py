"""Benchmarks: commands that write records; `gen_turbo.report` makes tables and plots of them."""
