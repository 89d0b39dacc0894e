"""One attention layer by the plugin's kernels and by PyTorch, outside an engine: for ``gpu_check.py`` and the tests."""
