"""Hosts of transformers vision-language models."""
