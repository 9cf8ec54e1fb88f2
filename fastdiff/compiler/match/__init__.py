"""Find the nodes of a graph that become one fused operation."""
