"""What runs a step, and the clock: compiling, CUDA graphs, joined projections, kernels. Knows no model."""
