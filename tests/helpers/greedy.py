"""Shared by tests: genai_greedy, our_greedy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime_genai as og

from glm4runtime import SamplingParams, Session


def genai_greedy(bundle: Path, prompt: list[int], count: int) -> list[int]:
    model = og.Model(str(bundle))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + count)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]


def our_greedy(session: Session, prompt: list[int], count: int) -> list[int]:
    return list(session.generate(prompt, SamplingParams(max_new_tokens=count)))
