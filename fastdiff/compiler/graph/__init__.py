"""A graph's nodes: what they compute, their effects, the canonical form, and how to edit them."""
