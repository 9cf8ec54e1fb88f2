"""Which algorithm computes a convolution, by measured times and within a budget of memory."""
