"""Records of benchmarks made into tables and plots; it reads records and nothing else."""
