"""Steps of ``gpu_check.py`` that need the whole project, not only torch and triton."""
