"""The compiler's story: config -> trace -> passes -> recipes -> weights -> manifest."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import onnx
import onnx_ir as ir
import torch

from glm4export.build.from_quantized import described, suited
from glm4export.build.options import BuildOptions
from glm4export.bundle.folder import PRODUCER, new_bundle, require_space
from glm4export.bundle.genai import FILE as GENAI_CONFIG
from glm4export.bundle.genai import genai_config
from glm4export.calibration.calibrate import calibrate, token_sequences
from glm4export.calibration.observe import linears
from glm4export.graph.skeleton import DTYPE_NAMES, Skeleton
from glm4export.graph.trace import trace, trace_encoder
from glm4export.passes.cut_stages import cut_stages
from glm4export.passes.pipeline import pipeline
from glm4export.sources.checkpoint import CONFIG, SIDE_FILES, Checkpoint, Location
from glm4export.sources.config_json import config_data, parse_config, read_token_ids, sequence_limit
from glm4export.sources.ledger import classifier_head, unused_heads
from glm4export.sources.lora import Adapter, labels_brought, merged, source_of
from glm4export.sources.quantized.checkpoint import QuantizedCheckpoint, open_checkpoint
from glm4export.sources.sidefiles import check_side_files
from glm4export.sources.task import read_task
from glm4export.sources.tied import as_stored
from glm4export.sources.turns import with_turn_tokens
from glm4export.tensorrt.plugin.geometry import Geometry
from glm4export.terminal.progress import Progress, note
from glm4export.weights.fp16 import Fp16Scales, fp16_scales
from glm4export.weights.quantize import Scheme
from glm4export.weights.recipes import Recipe
from glm4export.weights.storage import EMBEDDING, HEAD, SCORE
from glm4export.weights.tensors import Tensors
from glm4export.weights.write import Layout, lay_out, write_weights
from glm4graphs.config import Glm4Config
from glm4graphs.encoder import Encoding
from glm4runtime.contract import (
    FEATURES,
    MANIFEST,
    TENSORRT,
    WEIGHTS,
    CacheSpec,
    FileSpec,
    GraphName,
    GraphSpec,
    LoraSpec,
    Manifest,
    TensorSpec,
    TokenIds,
    UserError,
    graph_names,
    sha256_of,
)

Stage = Callable[[str], AbstractContextManager[object]]  # brackets a named step of the build


class Bar(Protocol):
    """A progress display over so many bytes."""

    def __call__(self, total: int, what: str = ...) -> AbstractContextManager[Progress]: ...


class Engines(Protocol):
    """Builds TensorRT engines of a bundle: :class:`glm4export.tensorrt.engines.EngineBuilder`."""

    def check(self, folder: Path, weights: Mapping[str, tuple[str, int]], attention: str) -> None:
        """Raise UserError where memory, or the disk under ``folder``, has no room for engines of these weights.

        Or where none can be built with that attention. Weights by name: their dtype and bytes.
        """

    def add(self, folder: Path, manifest: Manifest) -> Manifest:
        """Build them beside graph and weights; returns the manifest with their files."""


def build(
    location: Location,
    out: Path,
    options: BuildOptions,
    *,
    stage: Stage,
    bar: Bar,
    adapters: Sequence[Adapter] = (),
    engines: Engines | None = None,
) -> Manifest:
    """Compile a checkpoint, with LoRA adapters merged in their order, into the bundle ``out``.

    Raises UserError; leaves an earlier bundle alone when it fails.
    """
    inputs = [location.folder, *(adapter.folder for adapter in adapters)]
    inputs += [] if options.calibrate is None else [options.calibrate]
    with new_bundle(out, inputs) as folder:  # first: an output that can't be written is told before any work
        config_file = location.folder / CONFIG
        data = config_data(config_file, yarn=options.yarn_factor)
        declared = parse_config(data, str(config_file))
        base = open_checkpoint(location.folder)
        labels = None if SCORE in base.tensors else labels_brought(adapters)
        task = read_task(
            data,
            str(config_file),
            options.task,
            pooling=options.pooling,
            normalize=options.normalize,
            num_labels=labels,
        )
        options.require_fit(task.name, declared.num_hidden_layers)
        causal = task.encoding is None
        tokens, added = TokenIds((), task.pad, None), dict[str, int]()
        if causal:
            tokens, added = with_turn_tokens(read_token_ids(location.folder), location.folder, declared.vocab_size)
        max_seq_len = sequence_limit(declared, options.max_seq_len)
        with stage("check"):
            brought = {} if labels is None else classifier_head(declared, task.encoding)
            base.check(declared, task.encoding, brought)
            checkpoint = merged(base, adapters, tied=declared.tie_word_embeddings, brought=brought)
            check_side_files(location.folder)
            config = as_stored(declared, checkpoint) if causal else declared
            scales = fp16_scales(config, checkpoint) if options.compute_dtype == torch.float16 else None
        if isinstance(base, QuantizedCheckpoint) and adapters:
            note(f"{base.folder}: quantized already; adapters are merged into its dequantized weights")
        elif isinstance(base, QuantizedCheckpoint):
            unused = unused_heads(base.tensors, task.encoding)
            options = suited(options, base, unused)
            note(described(options, base, unused))
        for adapter in adapters:
            if told := adapter.other_base(location):
                note(told)
        if added:
            names = ", ".join(f"{text} ({token})" for text, token in added.items())
            note(f"{location.folder}: eos_token_id lacks {names}: others' turns, so the bundle stops on them too")
        if config != declared:
            found = f"the stored {HEAD} differs" if HEAD in base.tensors else "an adapter makes the head differ"
            note(
                f"{config_file} says tie_word_embeddings, but {found} from the embedding: "
                f"{'the stored head' if HEAD in base.tensors else 'a head of its own'} is used, as transformers does"
            )
        if unused := unused_heads(checkpoint.tensors, task.encoding):
            why = "needs no head" if task.name == FEATURES else "has a head of its own"
            note(f"{location.folder}: {', '.join(unused)} left out, since {task.name} {why}")
        skeletons: dict[str, Skeleton] = {}
        for name in graph_names(options.target, task.name):
            with stage(f"trace {name}"):
                skeletons[name] = compile_graph(
                    config, name, options, max_seq_len=max_seq_len, scales=scales, encoding=task.encoding
                )
        stages = None
        if options.stages is not None:
            stages, skeletons = cut_stages(skeletons, options.stages)
        recipes = _shared_recipes(skeletons)
        layout = lay_out(recipes)
        calibrated_weights = options.calibrate is not None and options.calibrates_weights
        require_space(folder, layout.size * (2 if calibrated_weights else 1))
        if engines is not None:  # before the weights are written: they take the longest
            stored = {name: (recipe.dtype, recipe.nbytes) for name, recipe in recipes.items()}
            engines.check(folder, stored, options.attention)
        total = sum(recipe.nbytes for recipe in recipes.values())
        with _reader(config, checkpoint, options, folder, stage, bar) as reader, bar(total) as progress:
            files = {WEIGHTS: write_weights(folder / WEIGHTS, recipes, layout, reader, progress)}
        graphs: dict[str, GraphSpec] = {}
        for graph, skeleton in skeletons.items():
            with stage(f"write {graph}"):
                graphs[graph] = _write_graph(skeleton, folder / f"{graph}.onnx", recipes, layout)
        plain = options.inputs == "ids" and not options.position_ids and options.stages is None
        if causal and options.target != TENSORRT and plain:  # onnxruntime-genai knows the inputs of such graphs only
            text = genai_config(config, tokens, options.target, max_seq_len)
            (folder / GENAI_CONFIG).write_text(text, encoding="utf-8")
        for side in SIDE_FILES:
            if (location.folder / side).is_file():
                shutil.copyfile(location.folder / side, folder / side)
        if options.yarn_factor is not None:  # the model that was built, for verify and whoever else reads it
            (folder / CONFIG).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        manifest = Manifest(
            producer=PRODUCER,
            producer_version=version("glm4export"),
            family="glm4",
            task=task.name,
            target=options.target,
            precision=options.precision,
            vocab_size=config.vocab_size,
            config=dataclasses.asdict(config),
            source={**location.source, "fingerprint": checkpoint.fingerprint(), **source_of(adapters)},
            tokens=tokens,
            kv_cache=_cache_spec(config, options, max_seq_len) if causal else None,
            encoder=task.spec(max_seq_len),
            lora=_lora_spec(options, scales),
            stages=stages,
            graphs=graphs,
            files=_file_specs(folder, files),
        )
        if engines is not None:
            manifest = engines.add(folder, manifest)
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def compile_graph(
    config: Glm4Config,
    name: GraphName,
    options: BuildOptions,
    *,
    max_seq_len: int,
    scales: Fp16Scales | None,
    encoding: Encoding | None = None,
) -> Skeleton:
    """Trace one graph and run its target's passes; no weights are read. ``encoding`` is for the one without a cache."""
    dtype = options.compute_dtype
    if encoding is None:
        model = trace(config, name, dtype=dtype, max_seq_len=max_seq_len)
    else:
        model = trace_encoder(config, encoding, dtype=dtype, max_seq_len=max_seq_len)
    skeleton = Skeleton(model, config, max_seq_len, encoding)
    if options.attention == "plugin":
        # Refuses what the kernels don't take
        Geometry.of(config, max_seq_len, options.compute_name, options.cache_dtype)
    for step in pipeline(options, name, scales):
        step(skeleton)
    return skeleton


def _lora_spec(options: BuildOptions, scales: Fp16Scales | None) -> LoraSpec | None:
    if options.lora_slots is None:
        return None
    return LoraSpec(options.lora_slots, options.slot_rank, 1.0 if scales is None else float(scales.branch))


def _cache_spec(config: Glm4Config, options: BuildOptions, max_seq_len: int) -> CacheSpec:
    return CacheSpec(
        layers=config.num_hidden_layers,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dtype=options.cache_dtype,
        max_seq_len=max_seq_len,
    )


@contextmanager
def _reader(
    config: Glm4Config, checkpoint: Checkpoint, options: BuildOptions, folder: Path, stage: Stage, bar: Bar
) -> Iterator[Tensors]:
    """What recipes read: the checkpoint, with what calibration found where that was asked for."""
    formats = options.formats if options.calibrates_weights else None
    if options.calibrate is None:
        yield checkpoint
        return
    try:
        text = options.calibrate.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{options.calibrate}: cannot be read as text ({error})") from None
    sequences = token_sequences(text, checkpoint.folder)

    def scheme_for(name: str) -> Scheme | None:
        if formats is None or (isinstance(checkpoint, QuantizedCheckpoint) and name in checkpoint.linears):
            return None  # the text is for the cache alone
        stored = HEAD if name == EMBEDDING else name  # a tied head's data is the embedding's
        return formats.scheme(stored, checkpoint.tensors[name].shape[1])

    with TemporaryDirectory(dir=folder) as scratch:
        # every linear of a layer is read for its output, the head for itself alone
        read = [name for name in linears(config, checkpoint) if name.endswith("_proj.weight") or scheme_for(name)]
        stored = (checkpoint.tensors[name] for name in read)
        total = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in stored)
        with stage("calibrate"), bar(total, "calibrate") as progress:
            calibrated = calibrate(config, checkpoint, sequences, scheme_for, Path(scratch), progress)
        yield calibrated


def _shared_recipes(skeletons: dict[str, Skeleton]) -> dict[str, Recipe]:
    """One set of recipes for all graphs, which share weights.bin; the same name must mean the same tensor."""
    shared: dict[str, Recipe] = {}
    for skeleton in skeletons.values():
        for name, recipe in skeleton.recipes.items():
            if shared.setdefault(name, recipe) != recipe:
                raise AssertionError(f"{name}: two graphs store it differently: {shared[name]} and {recipe}")
    return shared


def _write_graph(skeleton: Skeleton, path: Path, recipes: dict[str, Recipe], layout: Layout) -> GraphSpec:
    """Point the initializers into weights.bin, save, and let onnx.checker read it back."""
    for name, value in skeleton.graph.initializers.items():
        if name in recipes:
            assert value.dtype is not None and value.shape is not None
            value.const_value = ir.ExternalTensor(
                WEIGHTS,
                layout.offsets[name],
                recipes[name].nbytes,
                value.dtype,
                shape=value.shape,
                name=name,
                base_dir=path.parent,
            )
    ir.save(skeleton.model, path)
    try:
        onnx.checker.check_model(path, full_check=False)
    except onnx.checker.ValidationError as error:
        raise UserError(f"{path.name}: onnx.checker refuses the graph; please report this: {error}") from error
    return GraphSpec(path.name, _specs(skeleton.graph.inputs), _specs(skeleton.graph.outputs))


def _specs(values: Sequence[ir.Value]) -> tuple[TensorSpec, ...]:
    specs = []
    for value in values:
        assert value.name is not None and value.shape is not None and value.dtype is not None
        dims = tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape)
        specs.append(TensorSpec(value.name, DTYPE_NAMES[value.dtype], dims))
    return tuple(specs)


def _file_specs(folder: Path, known: dict[str, FileSpec]) -> dict[str, FileSpec]:
    """Size and sha256 of every file in the bundle; those hashed while written aren't read again."""
    names = sorted(path.name for path in folder.iterdir())
    return {
        name: known.get(name) or FileSpec((folder / name).stat().st_size, sha256_of(folder / name)) for name in names
    }
