"""Benchmarks: commands that write records, and tables and plots made of nothing but records."""
