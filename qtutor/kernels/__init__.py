"""What the core computes with PyTorch's operators, once more as GPU kernels."""
