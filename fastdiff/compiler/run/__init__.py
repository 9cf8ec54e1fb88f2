"""The calls of a fused graph, their packed weights, and the recordings that C++ replays."""
