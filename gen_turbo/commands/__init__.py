"""The commands of `gen-turbo`, one module each."""
