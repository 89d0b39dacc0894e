"""From rows of logits to token ids: :class:`SamplingParams` say how, :class:`Sampler` does it."""

from glm4runtime.sampling.params import SamplingParams
from glm4runtime.sampling.sampler import Sampler
from glm4runtime.sampling.scratch import Scratch

__all__ = ["Sampler", "SamplingParams", "Scratch"]
