"""Pure tensor functions on token plans: partition, matching, scoring, schedule. Imports torch and nothing else."""
