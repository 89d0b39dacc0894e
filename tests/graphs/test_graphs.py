"""The graphs as PyTorch modules, before they are traced: the same logits as transformers', by their own signature."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glm4export.graph.signature import SIGNATURES
from glm4export.sources.config_json import read_config
from glm4graphs.graphs import GRAPHS, Graph
from tests.helpers import checkpoints

IDS = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 0, 0, 0]])  # right-padded
LENGTHS = torch.tensor([5, 2])


def test_every_graph_has_a_signature() -> None:
    assert SIGNATURES.keys() == GRAPHS.keys()


@pytest.mark.parametrize(
    ("name", "rows"), [("decode", [[0, 1, 2, 3, 4]] * 2), ("prefill", [[4], [1]]), ("step", [[3, 4], [0, 1]])]
)
def test_rows_that_reach_the_head(name: str, rows: list[list[int]], tmp_path: Path) -> None:
    model = checkpoints.random_model()
    config = read_config(checkpoints.save(model, tmp_path) / "config.json")
    graph = Graph(config, 8, *GRAPHS[name]).eval()
    graph.load_state_dict(model.state_dict())  # strict: parameters have the checkpoint's names
    mask = (torch.arange(IDS.shape[1]) < LENGTHS[:, None]).long()
    given = {"input_ids": IDS, "attention_mask": mask, "logit_rows": torch.tensor(rows)}
    cache = [(torch.zeros(2, 2, 8, 32), torch.zeros(2, 2, 8, 32)) for _ in range(2)]
    with torch.no_grad():
        logits, presents = graph({key: given[key] for key in SIGNATURES[name].inputs}, cache)
        for row, (length, wanted) in enumerate(zip(LENGTHS.tolist(), rows, strict=True)):
            expected = model(IDS[row : row + 1, :length]).logits[0]
            for found, position in zip(logits[row], wanted, strict=True):
                if position < length:
                    torch.testing.assert_close(found, expected[position], rtol=0, atol=2e-5)
    assert logits.shape == (2, len(rows[0]), 96) and logits.dtype == torch.float32
    assert [key.shape for key, _ in presents] == [(2, 2, 8, 32)] * 2
