"""``glm4export serve --ray`` in a process, for tools/ray_check.py."""
