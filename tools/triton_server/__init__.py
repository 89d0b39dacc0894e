"""NVIDIA's Triton Inference Server out of the package nvidia-pytriton, for triton_check.py."""
