"""The command line. Only argparse here: each command imports what it needs when it runs, so ``--help`` is instant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from glm4export.terminal import streams
from glm4export.terminal.errors import message_text
from glm4runtime import signals
from glm4runtime.contract import UserError, installing

#: Each is a module in glm4export/commands: its options and its run.
COMMANDS = {
    "build": "compile a checkpoint into a bundle",
    "engine": "build TensorRT engines for a finished bundle; no checkpoint needed",
    "adapter": "convert a LoRA adapter for sessions of a bundle built with --lora-slots",
    "generate": "answer a prompt",
    "chat": "a conversation on the terminal",
    "batch": "answer a file of requests in OpenAI's batch format; goes on where it was ended",
    "serve": "answer over HTTP, many at once: OpenAI's API, metrics, limits",
    "embed": "one embedding per text, of a bundle built with --task features and --pooling",
    "classify": "labels of texts or of spans in them, of a classifier's bundle",
    "verify": "compare a bundle with PyTorch in fp32; exit status 1 past the thresholds",
    "perplexity": "score a text: perplexity, loss, bits per byte",
    "inspect": "show what a bundle holds, or what a model will take before it is built",
    "triton": "make a bundle a model in a repository of NVIDIA's Triton Inference Server",
    "prepare": "save a bundle's weights as this machine's kernels want them: one copy for several processes",
    "bench": "measure speed and memory beside this machine's limits",
}


def main(argv: Sequence[str] | None = None, *, own_process: bool = False) -> int:
    """Run one command. Returns the exit status: 0, 1 (verify: past its thresholds; batch: a request
    failed), 2 (the user's mistake), 130.

    own_process: there is nothing in this process but the command, which may then start again with huge pages.
    SIGHUP, SIGINT and SIGTERM end the process, with 128 and their number; see :mod:`glm4runtime.signals`.
    """
    streams.prepare()
    with signals.handled():
        return _run(argv, own_process)


def _run(argv: Sequence[str] | None, own_process: bool) -> int:
    try:
        try:
            arguments = _parser(sys.argv[1:] if argv is None else argv).parse_args(argv)
            if own_process and arguments.opens_session:
                from glm4export.huge_pages import start_with_huge_pages

                start_with_huge_pages()
            status: int = arguments.run(arguments)
            return status
        finally:
            print(end="", flush=True)  # here, where a broken pipe is caught
    except UserError as error:
        return _complain(str(error))
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        return _complain(f"{error.name} is not installed; {installing(extra)}")
    except KeyboardInterrupt:  # in a conversation
        streams.complain("interrupted")
        return 130
    except BrokenPipeError:  # the reader went away, as `| head` does
        streams.drop()
        return 1
    except OSError as error:  # standard output on a full disk, a file that can't be read
        streams.drop()
        return _complain(str(error))


_EXTRAS = {
    "torch": "compile",
    "onnx": "compile",
    "onnx_ir": "compile",
    "onnxscript": "compile",
    "safetensors": "compile",
    "huggingface_hub": "compile",
    "tqdm": "compile",
    "onnxruntime": "cpu",
    "matplotlib": "bench",
    "fastapi": "serve",
    "pydantic": "serve",
    "prometheus_client": "serve",
    "uvicorn": "serve",
}


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the options of the commands that ``argv`` may name: a command's module costs an import."""
    parser = argparse.ArgumentParser(
        prog="glm4export", description="Compile GLM-4 to ONNX prefill and decode graphs, and run them.", epilog=_EXAMPLE
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name in argv:
            module = import_module(f"glm4export.commands.{name}")
            command.epilog = module.EXAMPLE
            command.set_defaults(run=module.run, opens_session=False)
            module.configure(command)
    return parser


_EXAMPLE = "example: glm4export build zai-org/GLM-4-9B-0414 -o glm-4-9b-fp16 --precision fp16"


def _complain(message: str) -> int:
    streams.complain(f"glm4export: error: {message_text(message)}")
    return 2
