"""The bundle contract: what a compiled GLM-4 folder holds and what its graphs take and give.

The compiler writes it, the runtime reads it, and both import it from here. Standard library only.
"""

from glm4runtime.contract.errors import BundleError, UserError
from glm4runtime.contract.files import SHA256, SHA256_WORDS, FileSpec, check_file, refuse_pointer, sha256_of
from glm4runtime.contract.json_reader import FieldReader, read_json, shown
from glm4runtime.contract.manifest import CacheSpec, GraphSpec, Manifest, TensorSpec, TokenIds, read_manifest
from glm4runtime.contract.names import (
    ATTENTION_MASK,
    DECODE,
    DTYPE_BYTES,
    FORMAT_VERSION,
    GEOMETRY,
    INPUT_IDS,
    LOGIT_ROWS,
    LOGITS,
    MANIFEST,
    POSITION_IDS,
    PREFILL,
    SIDE_FILES,
    STEP,
    TARGETS,
    TENSORRT,
    WEIGHTS,
    WRITE_INDICES,
    graph_names,
    past_name,
    present_name,
)

__all__ = [
    "ATTENTION_MASK",
    "DECODE",
    "DTYPE_BYTES",
    "FORMAT_VERSION",
    "GEOMETRY",
    "INPUT_IDS",
    "LOGITS",
    "LOGIT_ROWS",
    "MANIFEST",
    "POSITION_IDS",
    "PREFILL",
    "SHA256",
    "SHA256_WORDS",
    "SIDE_FILES",
    "STEP",
    "TARGETS",
    "TENSORRT",
    "WEIGHTS",
    "WRITE_INDICES",
    "BundleError",
    "CacheSpec",
    "FieldReader",
    "FileSpec",
    "GraphSpec",
    "Manifest",
    "TensorSpec",
    "TokenIds",
    "UserError",
    "check_file",
    "graph_names",
    "past_name",
    "present_name",
    "read_json",
    "read_manifest",
    "refuse_pointer",
    "sha256_of",
    "shown",
]
