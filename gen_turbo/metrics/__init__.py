"""What is measured: the distance between two images, and the arithmetic that a run spends in attention."""
