"""The CUDA kernels compiled for the host, so that they run without a GPU and under sanitizers."""
