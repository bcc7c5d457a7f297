"""What is measured: cells, matrices, single feeds and kernels."""
