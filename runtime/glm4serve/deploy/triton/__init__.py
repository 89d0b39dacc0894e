"""NVIDIA's Triton Inference Server: what a model's folder in its repository holds.

``model.py`` and ``tensors.py`` are copied into that folder, where Triton runs them: they import each other and the
runtime, nothing else of this package. ``glm4export triton`` makes the folder.
"""
