"""Choose the algorithm of each convolution, by measured times and within a budget of memory."""
