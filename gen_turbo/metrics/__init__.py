"""What is measured: the distance between two pictures, and the arithmetic that a run spends in attention."""
