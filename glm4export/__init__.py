"""A model compiler for GLM-4."""

import glm4runtime  # noqa: F401 - first, for what it sets before anything imports onnxruntime
