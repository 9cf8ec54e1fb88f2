"""Replace nodes of a graph by the fused operations that compute the same."""
