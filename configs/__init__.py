"""YAML only: the settings of methods, pipelines and benchmarks."""
