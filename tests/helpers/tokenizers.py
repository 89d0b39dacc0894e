"""Shared by tests: make_raw."""

from __future__ import annotations

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer

SPECIAL = ["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|observation|>"]


CORPUS = [
    "hello world, hello tokens",
    "你好，世界。今天天气怎么样。",
    "naïve café 😀😀👩‍👩‍👧 ñ e\u0301",
    "def f(x):\n    return x + 1\n",
]


def make_raw() -> RawTokenizer:
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator(CORPUS * 4, trainer)
    raw.add_special_tokens(SPECIAL)
    # Added tokens are text: one that the byte alphabet spells, two that it can't, one that it reads as a byte.
    raw.add_tokens([AddedToken(text, special=False) for text in ("<think>", "two words", "中文 token", "Ā")])
    return raw
