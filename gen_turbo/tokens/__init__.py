"""Pure tensor functions on token maps: maps, matching, grouping, selecting, scoring. Imports torch and nothing else."""
