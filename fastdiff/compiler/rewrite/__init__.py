"""Fused operations put in the places of what they compute, in a graph."""
