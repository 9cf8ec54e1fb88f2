"""Which nodes of a graph become one fused operation."""
