"""What a fused graph calls, with weights that are packed once, recorded and replayed in C++."""
