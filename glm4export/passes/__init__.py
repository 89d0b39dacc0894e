"""The passes, one per file, and in :mod:`glm4export.passes.pipeline` which of them a graph gets, in order.

A pass takes a skeleton, rewrites its nodes and recipes in place, and returns what it counted. Counts follow from the
config, the pass's arguments and the passes before: every pass states its own, and another one is an error.
"""
