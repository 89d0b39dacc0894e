"""Quantized checkpoints as sources: GPTQ, AWQ and compressed-tensors.

Their integers are handed over as they are where a build stores the same ones, and dequantized where it doesn't.
"""
