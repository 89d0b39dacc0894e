import glm4runtime  # noqa: F401 - first, for what it sets before anything imports onnxruntime
