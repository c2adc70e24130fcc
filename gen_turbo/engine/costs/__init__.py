"""What calls cost, counted from modules and shapes: what merging is expected to gain, and what it has saved."""
